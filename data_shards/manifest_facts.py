"""What a manifest says of a data set: its columns, the facts about the whole, and their digest."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.writer import ShardInfo

FORMAT = 2
FILE_NAME = "manifest.parquet"
REMEDY = "restore it or build the data set again (make shards)"
METADATA_KEY = b"amalia_vl"  # of the Parquet file's schema; holds the facts as JSON

_IMAGE = pa.struct(
    [
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tiles", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("json_crc32", pa.uint32()),
        ("json_sha256", pa.binary(32)),
        ("images", pa.list_(_IMAGE)),
        ("tokens", pa.int32()),
        ("target_tokens", pa.int32()),
        ("tokens_rejected", pa.int32()),
        ("target_tokens_rejected", pa.int32()),
        ("tiles", pa.int32()),
        ("variety", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
    ]
)


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the cause and the remedy."""


@dataclass(frozen=True)
class ManifestInfo:
    """Facts about the whole data set."""

    name: str
    preference: bool
    tokenizer_digest: str
    geometry_digest: str
    pillow: str  # version; resizing changed between 12 and 13, for instance
    shards: tuple[ShardInfo, ...]
    inputs_digest: str  # of all that the build read; decides whether to build again
    quarantined: int  # samples refused by the build
    varieties: Mapping[str, int] = field(default_factory=dict)  # label -> samples
    languages: Mapping[str, int] = field(default_factory=dict)
    licences: Mapping[str, int] = field(default_factory=dict)
    # Where the shards lie: relative to the data set's folder, or absolute (shards left in place).
    shards_root: str = "shards"
    # How to read records that we did not write; None: ours.
    layout: Mapping[str, Any] | None = None
    digest: str = ""  # SHA-256 of the rows, the index and the facts that decide batches
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "ManifestInfo":
        """Raises ValueError, TypeError or KeyError on anything but what `to_json` gave."""
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown facts {sorted(unknown)}")
        shards = tuple(ShardInfo(**shard) for shard in values["shards"])
        for shard in shards:
            if shard.name.startswith("/") or ".." in shard.name.split("/"):
                raise ValueError(f"shard {shard.name!r} lies outside the shards' folder")
        return cls(**{**values, "shards": shards})


def content_digest(
    info: ManifestInfo, rows: Mapping[str, str], index: Mapping[str, Mapping[str, Any]]
) -> str:
    """SHA-256 of what decides batches: facts, rows and index; not how Parquet stored them.

    Args:
        rows: what `RowDigests` says of the Parquet file's rows.
        index: what stands of each index column in index.json.
    """
    facts = [info.format, info.name, info.preference, info.tokenizer_digest, info.geometry_digest]
    facts += [info.pillow, info.layout, [asdict(shard) for shard in info.shards]]
    content = json.dumps([facts, rows, index], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


class RowDigests:
    """SHA-256 of each column of rows that come in parts; how they were cut does not matter."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}

    def update(self, rows: pa.Table) -> None:
        """Add rows of `SCHEMA` without nulls."""
        for batch in rows.to_batches():
            for name in batch.schema.names:
                self._add(name, batch.column(name))

    def hexdigests(self) -> dict[str, str]:
        """Column -> digest."""
        return {name: digest.hexdigest() for name, digest in sorted(self._digests.items())}

    def _add(self, name: str, array: pa.Array) -> None:
        if pa.types.is_list(array.type):
            self._feed(f"{name}.length", np.asarray(array.value_lengths()).astype("<i8"))
            flat = array.flatten()
            for index in range(flat.type.num_fields):
                self._add(f"{name}.{flat.type.field(index).name}", flat.field(index))
        elif pa.types.is_string(array.type):
            ends, content = string_bytes(array)
            self._feed(f"{name}.length", np.diff(ends).astype("<i8"))
            self._feed(name, content)
        elif pa.types.is_fixed_size_binary(array.type):
            width, data = array.type.byte_width, array.buffers()[1]
            values = b"" if data is None else memoryview(data)[array.offset * width :]
            self._feed(name, values[: len(array) * width])
        else:
            self._feed(name, np.asarray(array).astype("<i8"))

    def _feed(self, name: str, values: Any) -> None:
        if name not in self._digests:
            self._digests[name] = hashlib.sha256()
        self._digests[name].update(np.ascontiguousarray(values).data if len(values) else b"")


def string_bytes(array: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """(ends int32 [n + 1], bytes uint8 [ends[-1] - ends[0]]) of a string column's UTF-8."""
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return np.zeros(len(array) + 1, np.int32), np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    return ends, np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
