"""Rows of a Parquet file, a few at a time, only the columns that are needed.

Memory: one page of each column and 16 rows. Reading begins at the row group of the first row that
is wanted; rows before it in its group are decoded and passed over.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.sources.blocks import Piece
from data_shards.sources.rows import SourceError

_BATCH = 16  # rows decoded at a time
_BUFFER = 1 << 20  # bytes; without it a whole column of a row group is read into memory
# A column of a row group that says it unpacks to more than both is no data but a bomb.
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 200
_ERRORS = (pa.ArrowException, OSError)


@dataclass(frozen=True)
class Footer:
    """What a file says of itself: its rows and the names of its top-level columns."""

    rows: int
    columns: tuple[str, ...]


def footer(path: Path) -> Footer:
    """Read the end of a file; SourceError if it is damaged."""
    with _open(path) as file:
        return Footer(int(file.metadata.num_rows), tuple(file.schema_arrow.names))


def read(
    piece: Piece, columns: Collection[str]
) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(row of the file, record, None), or (row, {}, why it is bad).

    Args:
        columns: names, with a dot for a part of a struct; those that the file lacks are left out.

    Raises:
        SourceError: the file is damaged, or is no longer what was counted.
    """
    with _open(piece.file) as file:
        present = _present(file.schema_arrow.names, columns)
        groups, row = _groups_from(file, piece.first_row)
        _check_sizes(piece.file, file, groups, present)
        last = piece.first_row + piece.rows
        try:
            batches = file.iter_batches(_BATCH, groups, present, use_threads=False)
            for batch in batches:
                if row + batch.num_rows > piece.first_row:
                    begin = max(piece.first_row - row, 0)
                    for record, problem in _records(batch.slice(begin, last - row - begin)):
                        yield max(row, piece.first_row), record, problem
                        row = max(row, piece.first_row) + 1
                else:
                    row += batch.num_rows
                if row >= last:
                    return
        except _ERRORS as error:
            raise SourceError(_damaged(piece.file, error, f" after row {row}")) from None
    raise SourceError(f"{piece.file} became shorter while it was read; leave it alone and repeat")


def _present(names: Collection[str], columns: Collection[str]) -> list[str]:
    """Of a struct only the parts that are asked for, unless the whole of it is."""
    whole = {name for name in columns if name in names}
    parts = {name for name in columns if name not in names and name.partition(".")[0] in names}
    return sorted(whole | {name for name in parts if name.partition(".")[0] not in whole})


def _records(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):
        records = None
    if records is not None:
        yield from ((record, None) for record in records)
        return
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist()[0], None
        except UnicodeDecodeError as error:
            yield {}, f"a text is not UTF-8 ({error.reason})"
        except (ValueError, OverflowError) as error:  # dates before the year 1, for one
            yield {}, f"a value cannot be read ({' '.join(str(error).split())[:200]})"


def _check_sizes(
    path: Path, file: pq.ParquetFile, groups: Collection[int], names: Collection[str]
) -> None:
    tops = {name.partition(".")[0] for name in names}
    for group in groups:
        row_group = file.metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            size, packed = column.total_uncompressed_size, column.total_compressed_size
            top = column.path_in_schema.partition(".")[0]
            if top in tops and size > _BOMB_BYTES and size > _BOMB_RATIO * packed:
                raise SourceError(
                    f"{path}: column {column.path_in_schema} of row group {group} unpacks "
                    f"{packed} bytes to {size}; take the file out of data.sources"
                )


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=_BUFFER)
    except _ERRORS as error:
        raise SourceError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception, where: str = "") -> str:
    reason = " ".join(str(error).split())
    return (
        f"{path} is not readable as Parquet{where} ({reason}); restore it or take it out of "
        "data.sources"
    )


def _groups_from(file: pq.ParquetFile, first: int) -> tuple[list[int], int]:
    """Row groups that hold rows from `first` on, and the number of their first row."""
    row = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row + size > first:
            return list(range(group, file.num_row_groups)), row
        row += size
    return [], row
