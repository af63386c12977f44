"""What every source reader yields, and how images named by a row become bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_shards.sample import SampleError

FIELDS = ("messages", "images", "chosen", "rejected")
MAX_IMAGE_BYTES = 256 << 20


class SourceError(ValueError):
    """A source file that cannot be read at all; names the file and the remedy."""


@dataclass(frozen=True)
class SourceRow:
    """One row, as it came: checked later, in a worker.

    Attributes:
        number: of the row in its data set, counted over all files in order.
        origin: "file:row" for people (1-based line in JSONL, 0-based row in Parquet).
        folder: what relative image paths start from.
        values: our field names to whatever the source holds.
        problem: why the row could not even be read, else None.
    """

    number: int
    origin: str
    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def messages(self) -> Any:
        """The messages; a JSON string is accepted for a list."""
        value = self.values.get("messages")
        if isinstance(value, str):
            try:
                return json.loads(value)
            except (ValueError, RecursionError) as error:
                raise SampleError(f"messages is text but not JSON ({error})") from None
        return value

    def images(self) -> list[bytes]:
        """Encoded images: each given as bytes, as a path, or as {"bytes", "path"}.

        Raises:
            SampleError: an image that is none of these, or that cannot be read.
        """
        value = self.values.get("images")
        if value is None:
            return []
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return [self._image(item, number) for number, item in enumerate(items)]

    def _image(self, item: Any, number: int) -> bytes:
        if isinstance(item, Mapping):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            return item
        if isinstance(item, str) and item:
            return read_inside(self.folder, item)
        raise SampleError(f"image {number} is neither bytes nor a path ({type(item).__name__})")


def read_inside(folder: Path, name: str) -> bytes:
    """Bytes of a regular file under `folder`.

    Raises:
        SampleError: the path is absolute, leaves the folder (also by a link), or cannot be read.
    """
    if "\0" in name or Path(name).is_absolute():
        raise SampleError(f"image path {name!r} is not relative to the source file's folder")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise SampleError(f"image path {name!r} leaves the source file's folder")
        if not path.is_file():
            raise SampleError(f"image {name!r} does not exist beside the source file")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise SampleError(f"image {name!r} has over {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise SampleError(f"image {name!r} cannot be read ({error})") from None
