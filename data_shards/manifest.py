"""The manifest of one data set: what every sample needs, without opening a shard.

    NAME/manifest.parquet   one row per sample, for people and tools (columns: manifest_facts.py)
    NAME/index/             the same numbers as flat columns that are mapped into memory

Opening costs the same for a thousand samples as for a hundred million. How damage is found:

- a file is missing, cut short, of another size, shape or type, or index.json was changed:
  `read_manifest`, always;
- a value of a column was changed: `verify_index`, when a plan is made (SHA-256 of every column);
- a column was changed after planning: when the sample is read, by the CRC-32 of every member, the
  token counts and the image sizes;
- index and digests were forged together: `verify_manifest`, which compares them with the Parquet
  file. The manifest's digest is then another, so a run that began before refuses to go on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.manifest_facts import (
    FILE_NAME,
    FORMAT,
    METADATA_KEY,
    REMEDY,
    SCHEMA,
    ManifestError,
    ManifestInfo,
    RowDigests,
    content_digest,
)
from data_shards.manifest_index import (
    COLUMNS,
    DIRECTORY,
    INDEX_FILE,
    DamagedIndex,
    batch_columns,
    check_rows,
    column_digest,
    map_columns,
    read_sealed,
    release,
)
from data_shards.manifest_writer import ManifestWriter, rows_to_table, write_manifest

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "REMEDY",
    "SCHEMA",
    "Manifest",
    "ManifestError",
    "ManifestInfo",
    "ManifestWriter",
    "read_manifest",
    "rows_to_table",
    "verify_manifest",
    "write_manifest",
]
_BATCH = 1 << 16  # Parquet rows looked at together


@dataclass(frozen=True)
class Manifest:
    """An opened manifest; n samples, m images in all. Arrays are mapped files, read-only."""

    path: Path
    info: ManifestInfo
    shard: np.ndarray  # int32 [n]
    json_span: np.ndarray  # int64 [n, 2]: offset, size
    json_crc32: np.ndarray  # uint32 [n]
    first_image: np.ndarray  # int64 [n + 1]: images of sample i are first_image[i:i+2]
    image_span: np.ndarray  # int64 [m, 2]: offset, size
    image_crc32: np.ndarray  # uint32 [m]
    image_hw: np.ndarray  # int32 [m, 2]: height, width
    image_tiles: np.ndarray  # int32 [m]
    tokens: np.ndarray  # int32 [n]
    tokens_rejected: np.ndarray  # int32 [n], 0 unless a pair
    target_tokens: np.ndarray  # int32 [n], both answers of a pair
    tiles: np.ndarray  # int32 [n]
    first_key_byte: np.ndarray  # int64 [n + 1]
    key_bytes: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shards_directory(self) -> Path:
        """Where the tar files are."""
        return self.path.parent / self.info.shards_root

    @cached_property
    def table(self) -> pa.Table:
        """The labels of all samples (key, variety, language, source, licence), from the Parquet
        file: large, for tools and tests."""
        return self.read(["key", "variety", "language", "source", "licence"])

    def key(self, row: int) -> str:
        """Key of one sample."""
        begin, end = self.first_key_byte[row : row + 2]
        return bytes(self.key_bytes[begin:end]).decode("utf-8", "replace")

    def read(self, columns: list[str], first: int = 0, stop: int | None = None) -> pa.Table:
        """Columns of rows `first` to `stop` from the Parquet file; other row groups stay unread.

        Raises:
            ManifestError: they cannot be read.
        """
        stop = len(self) if stop is None else stop
        parts, begin = [], 0
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                schema = file.schema_arrow.remove_metadata()
                if not schema.equals(SCHEMA):
                    raise ManifestError(f"{self.path} does not have a manifest's columns; {REMEDY}")
                for group in range(file.num_row_groups):
                    end = begin + file.metadata.row_group(group).num_rows
                    if begin < stop and end > first:
                        rows = file.read_row_group(group, columns=columns)
                        low, high = max(first - begin, 0), min(stop, end) - begin
                        parts.append(rows.slice(low, high - low))
                    begin = end
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(_unreadable(self.path, error)) from None
        if begin != len(self):
            raise ManifestError(f"{self.path} has {begin} rows, its index {len(self)}; {REMEDY}")
        if not parts:
            return SCHEMA.empty_table().select(columns)
        return pa.concat_tables(parts).replace_schema_metadata(None)

    def release(self) -> None:
        """Let go of the memory of all columns; they are read again where they are asked for."""
        release(getattr(self, name) for name in COLUMNS)

    def check_shards(self) -> None:
        """ManifestError unless every shard is there with its size (contents: CRC on reading)."""
        for shard in self.info.shards:
            path = self.shards_directory / shard.name
            try:
                size = path.stat().st_size
            except OSError:
                raise ManifestError(f"{path} is missing; {REMEDY}") from None
            if size != shard.size:
                raise ManifestError(
                    f"{path} has {size} bytes, its manifest says {shard.size}; {REMEDY}"
                )

    def check_environment(self, tokenizer_digest: str, geometry_digest: str) -> None:
        """ManifestError if token lengths or tiles were computed for something else."""
        info = self.info
        for what, built, now, remedy in (
            (
                "tokenizer",
                info.tokenizer_digest,
                tokenizer_digest,
                "set data.tokenizer to that one",
            ),
            (
                "tiling",
                info.geometry_digest,
                geometry_digest,
                "set model to the one it was built for",
            ),
            ("Pillow version", info.pillow, PIL.__version__, f"install pillow=={info.pillow}"),
        ):
            if built != now:
                raise ManifestError(
                    f"{self.path} was built with another {what} ({built[:12]}, now {now[:12]}); "
                    f"{remedy}, or build the shards again (make shards)"
                )

    def verify_index(self) -> None:
        """Read every column: its SHA-256 is the recorded one, and every row can be.

        Raises:
            ManifestError: naming the file, or the row and what is wrong with it.
        """
        sealed = _read_index(self.path)
        for name in COLUMNS:
            path = self.path.parent / DIRECTORY / f"{name}.npy"
            if column_digest(path) != sealed["columns"][name]["sha256"]:
                raise ManifestError(
                    f"{path} does not match its digest, so it was changed; {REMEDY}"
                )
        columns = {name: getattr(self, name) for name in COLUMNS}
        sizes = np.array([shard.size for shard in self.info.shards], np.int64)
        for row, cause in check_rows(columns, sizes, self.info.preference):
            raise ManifestError(f"{self.path}: row {row} ({self.key(row)}) {cause}; {REMEDY}")


def read_manifest(path: Path) -> Manifest:
    """Open a manifest; in milliseconds, whatever its size.

    Raises:
        ManifestError: a file is missing, of another size or shape, or of another format, or the
            facts were changed; names the file and the cause. Values: `verify_index`.
    """
    sealed = _read_index(path)
    info: ManifestInfo = sealed["info"]
    try:
        columns = map_columns(path.parent / DIRECTORY, sealed["columns"])
    except (DamagedIndex, KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{error}; {REMEDY}") from None
    if len(columns["tokens"]) != sealed["samples"] or not sealed["samples"]:
        raise ManifestError(f"{path} lists another number of samples than its index; {REMEDY}")
    return Manifest(path=path, info=info, **columns)


def verify_manifest(path: Path) -> Manifest:
    """Read a manifest in full: Parquet file and index are whole, agree, and can be.

    Raises:
        ManifestError: naming the file, the row or column, and the cause.
    """
    manifest = read_manifest(path)
    manifest.verify_index()
    digests, sealed = RowDigests(), _read_index(path)
    place = dict.fromkeys(COLUMNS, 0)
    for batch in _parquet_batches(path, manifest.info):
        digests.update(pa.Table.from_batches([batch]))
        for name, values in batch_columns(batch).items():
            first = place[name]
            stored = getattr(manifest, name)
            if name in ("first_image", "first_key_byte"):
                stored = np.diff(stored[first : first + len(values) + 1])
            else:
                stored = stored[first : first + len(values)]
            if not np.array_equal(stored, values):
                raise ManifestError(f"{path}: its index has other {name}; {REMEDY}")
            place[name] += len(values)
    if place["tokens"] != len(manifest) or digests.hexdigests() != sealed["rows"]:
        raise ManifestError(f"{path} does not match its own digest, so it was changed; {REMEDY}")
    return manifest


def _parquet_batches(path: Path, info: ManifestInfo) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if not schema.remove_metadata().equals(SCHEMA):
                raise ManifestError(f"{path} does not have a manifest's columns; {REMEDY}")
            facts = json.loads((file.metadata.metadata or {}).get(METADATA_KEY, b"null"))
            if facts != json.loads(json.dumps(info.to_json())):
                raise ManifestError(f"{path} and its index differ in their facts; {REMEDY}")
            for batch in file.iter_batches(_BATCH):
                if any(column.null_count for column in batch.columns):
                    raise ManifestError(f"{path} has empty cells; {REMEDY}")
                yield batch
    except (pa.ArrowException, OSError, RecursionError) as error:
        raise ManifestError(_unreadable(path, error)) from None
    except ValueError as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(_unreadable(path, error)) from None


def _read_index(path: Path) -> Mapping[str, Any]:
    """index.json, with its facts as `ManifestInfo`."""
    try:
        size = path.stat().st_size
    except OSError:
        raise ManifestError(
            f"{path} does not exist; build the data set first (make shards)"
        ) from None
    index = path.parent / DIRECTORY / INDEX_FILE
    if not index.exists():
        raise ManifestError(
            f"{path} has no {DIRECTORY}/{INDEX_FILE}: the manifest is not of "
            f"format {FORMAT}, which this version reads; build the data set again (make shards)"
        )
    try:
        sealed = read_sealed(index)
        info = ManifestInfo.from_json(sealed["info"])
        digest = content_digest(info, sealed["rows"], sealed["columns"])
        if sealed["parquet_size"] != size:
            raise ManifestError(
                f"{path} has {size} bytes, its index says {sealed['parquet_size']}; {REMEDY}"
            )
    except ManifestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = str(error) if isinstance(error, DamagedIndex) else f"{index} is damaged ({error})"
        raise ManifestError(f"{cause}; {REMEDY}") from None
    if digest != info.digest:
        raise ManifestError(f"{index} does not match its own digest, so it was changed; {REMEDY}")
    return {**sealed, "info": info}


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path} is not a readable Parquet file ({reason}); {REMEDY}"
