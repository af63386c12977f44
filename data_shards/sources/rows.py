"""What every source reader yields, and how images named by a row become bytes."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_shards.sample import SampleError

MAX_IMAGE_BYTES = 256 << 20
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_NO_JSON = {
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"\xfd7zX": "compressed with xz: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: set format=parquet",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it first",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it first",
}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class SourceError(ValueError):
    """A source file that cannot be read at all; names the file and the remedy."""


@dataclass(frozen=True)
class SourceRow:
    """One row, as it came: checked later, in a worker.

    Attributes:
        number: of the row in its data set, counted over all files in order.
        origin: "file:row" for people (1-based line in JSONL, else 0-based); WebDataset samples
            go by their key.
        folder: what relative image paths start from.
        values: column to whatever the source holds.
        problem: why the row could not even be read, else None.
        attached: (member name, content) of the images of a WebDataset sample.
    """

    number: int
    origin: str
    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    attached: Sequence[tuple[str, bytes]] = ()


def read_image(reference: Any, folder: Path, where: str) -> bytes:
    """Encoded bytes of an image given as bytes, as a path under `folder`, as a data URL, or as a
    {"bytes", "path"} of them.

    Raises:
        SampleError: none of these, or it cannot be read. Nothing is ever downloaded.
    """
    if isinstance(reference, Mapping):
        reference = reference.get("bytes") or reference.get("path")
    if isinstance(reference, bytes) and reference:
        return reference
    if not isinstance(reference, str) or not reference:
        kind = type(reference).__name__
        raise SampleError(f"{where} is neither bytes nor a path ({kind})")
    if match := _DATA_URL.match(reference):
        try:
            return base64.b64decode(reference[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise SampleError(f"{where} is a data URL that does not decode ({error})") from None
    if _URL.match(reference):
        raise SampleError(
            f"{where} is the address {reference[:200]!r}; download the images first and name files"
        )
    return read_inside(folder, reference)


def read_inside(folder: Path, name: str) -> bytes:
    """Bytes of a regular file under `folder`.

    Raises:
        SampleError: the path is absolute, leaves the folder (also by a link), or cannot be read.
    """
    if "\0" in name or Path(name).is_absolute():
        raise SampleError(f"image path {name[:200]!r} is not relative to the image folder {folder}")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise SampleError(f"image path {name[:200]!r} leaves the image folder {folder}")
        if not path.is_file():
            raise SampleError(f"image {name[:200]!r} does not exist in the image folder {folder}")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise SampleError(f"image {name[:200]!r} has over {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except (OSError, RuntimeError, UnicodeError) as error:
        # Not its text, which names the folder as it is on this machine.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SampleError(f"image {name[:200]!r} cannot be read ({reason})") from None


def open_text(path: Path) -> BinaryIO:
    """A file of JSON to read as bytes.

    Raises:
        SourceError: it cannot be opened, or is compressed, Parquet or UTF-16: each of its lines
            would be refused.
    """
    try:
        file = open(path, "rb")
        head = file.read(4)
        file.seek(0)
    except OSError as error:
        raise SourceError(f"{path} cannot be opened ({error.strerror}); correct the path") from None
    for magic, advice in _NO_JSON.items():
        if head.startswith(magic):
            file.close()
            raise SourceError(f"{path} is {advice}")
    return file
