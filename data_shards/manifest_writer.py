"""Writing a manifest, part after part, in bounded memory: the Parquet file and its index."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.durable import sync_directory
from data_shards.manifest_facts import (
    FILE_NAME,
    METADATA_KEY,
    REMEDY,
    SCHEMA,
    ManifestError,
    ManifestInfo,
    RowDigests,
    content_digest,
)
from data_shards.manifest_index import (
    DIRECTORY,
    INDEX_FILE,
    IndexWriter,
    check_rows,
    key_of,
    map_columns,
    write_sealed,
)

ROW_GROUP = 1 << 17  # rows of a Parquet row group, held in memory
_LABELS = {"varieties": "variety", "languages": "language", "licences": "licence"}


class ManifestWriter:
    """Writes `folder`/manifest.parquet and `folder`/index/, which appear with `close`.

    The bytes depend on the rows alone, not on how they were cut into parts. A manifest that was
    there before is replaced; write where nobody reads (a data set is built in a folder of its own).
    Use as a context manager: after an error nothing is left.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._aside = folder / f"{FILE_NAME}.tmp"
        self._index_aside = folder / f"{DIRECTORY}.tmp"
        shutil.rmtree(self._index_aside, ignore_errors=True)
        self._index = IndexWriter(self._index_aside)
        self._file = open(self._aside, "wb")
        self._parquet = pq.ParquetWriter(
            self._file, SCHEMA, compression="zstd", write_page_checksum=True
        )
        self._digests = RowDigests()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _LABELS}
        self._waiting: list[pa.Table] = []
        self.rows = 0  # added so far

    def add(self, rows: pa.Table) -> None:
        """Add rows of `SCHEMA`, in the order of the data set.

        Raises:
            ManifestError: a cell is empty.
        """
        rows = rows.select(SCHEMA.names).cast(SCHEMA)
        if any(_nulls(column) for column in rows.columns):
            raise ManifestError(f"{self._folder / FILE_NAME}: rows with empty cells")
        self._digests.update(rows)
        self._index.add(rows)
        for counts, column in _LABELS.items():
            for entry in rows[column].value_counts().to_pylist():
                self._counts[counts][entry["values"]] += entry["counts"]
        self.rows += rows.num_rows
        self._waiting.append(rows)
        if sum(part.num_rows for part in self._waiting) >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def close(self, info: ManifestInfo) -> ManifestInfo:
        """Finish both; returns `info` with its digest and the counts of labels filled in.

        Raises:
            ManifestError: no rows, or one that cannot be: it points outside its shard, say.
        """
        path = self._folder / FILE_NAME
        if not self.rows:
            raise ManifestError(f"{path} would list no sample; {REMEDY}")
        self._flush(1)
        described, rows = self._index.close(), self._digests.hexdigests()
        counts: dict[str, Any] = {
            name: dict(sorted(found.items())) for name, found in self._counts.items()
        }
        info = replace(info, digest=content_digest(info, rows, described), **counts)
        columns = map_columns(self._index_aside, described)
        sizes = np.array([shard.size for shard in info.shards], np.int64)
        for row, cause in check_rows(columns, sizes, info.preference):
            raise ManifestError(f"{path}: row {row} ({key_of(columns, row)}) {cause}; {REMEDY}")
        facts = json.dumps(info.to_json(), sort_keys=True)
        self._parquet.add_key_value_metadata({METADATA_KEY.decode(): facts})
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        content = {
            "info": info.to_json(),
            "samples": self.rows,
            "parquet_size": self._aside.stat().st_size,
            "rows": rows,
            "columns": described,
        }
        write_sealed(self._index_aside / INDEX_FILE, content)
        self._publish()
        return info

    def discard(self) -> None:
        """Drop what was written; harmless after `close`."""
        self._index.discard()
        if not self._file.closed:
            self._parquet.close()
            self._file.close()
        self._aside.unlink(missing_ok=True)
        shutil.rmtree(self._index_aside, ignore_errors=True)

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def _flush(self, least: int) -> None:
        """Write row groups while at least `least` rows wait; always the same cuts."""
        rows = pa.concat_tables(self._waiting) if self._waiting else SCHEMA.empty_table()
        first = 0
        while rows.num_rows - first >= least:
            group = rows.slice(first, ROW_GROUP).combine_chunks()
            self._parquet.write_table(group, row_group_size=ROW_GROUP)
            first += group.num_rows
        self._waiting = [rows.slice(first)] if first < rows.num_rows else []

    def _publish(self) -> None:
        index, old = self._folder / DIRECTORY, self._folder / f"{DIRECTORY}.old"
        shutil.rmtree(old, ignore_errors=True)
        if index.exists():
            os.rename(index, old)
        os.replace(self._aside, self._folder / FILE_NAME)
        os.rename(self._index_aside, index)
        sync_directory(self._folder)
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(path: Path, rows: pa.Table, info: ManifestInfo) -> ManifestInfo:
    """Write all rows at once; returns `info` as `ManifestWriter.close` does."""
    with ManifestWriter(path.parent) as writer:
        writer.add(rows)
        return writer.close(info)


def rows_to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Row dictionaries as a table of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def _nulls(column: pa.ChunkedArray) -> int:
    found = column.null_count
    if pa.types.is_list(column.type):
        for chunk in column.chunks:
            flat = chunk.flatten()
            found += flat.null_count + sum(flat.field(i).null_count for i in range(len(flat.type)))
    return int(found)
