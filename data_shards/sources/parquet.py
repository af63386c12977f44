"""Rows of a Parquet file, a few at a time, only the columns that are needed."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.sources.rows import FIELDS, SourceError, SourceRow

_BATCH = 32  # rows decoded at a time


def count(path: Path) -> int:
    """Rows of the file, from its footer."""
    with _open(path) as file:
        return int(file.metadata.num_rows)


def rows(
    path: Path, columns: Mapping[str, str], preference: bool, first_number: int, skip: int = 0
) -> Iterator[SourceRow]:
    """Rows from the `skip`-th on; row r gets number `first_number + r`.

    Args:
        columns: our field -> their column, for fields named otherwise.

    Raises:
        SourceError: the file is damaged or lacks a column that is needed.
    """
    with _open(path) as file:
        theirs = _columns(path, file, columns, preference)
        groups, row = _groups_after(file, skip)
        try:
            for batch in file.iter_batches(
                _BATCH, row_groups=groups, columns=list(theirs.values())
            ):
                for record in batch.to_pylist():
                    if row >= skip:
                        values = {ours: record[name] for ours, name in theirs.items()}
                        origin = f"{path.name}:{row}"
                        yield SourceRow(first_number + row, origin, path.parent, values)
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise SourceError(_damaged(path, error, f" after row {row}")) from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception, where: str = "") -> str:
    reason = " ".join(str(error).split())
    return (
        f"{path} is not readable as Parquet{where} ({reason}); restore it or take it out of "
        "data.sources"
    )


def _columns(
    path: Path, file: pq.ParquetFile, columns: Mapping[str, str], preference: bool
) -> dict[str, str]:
    present = set(file.schema_arrow.names)
    needed = {"messages", "chosen", "rejected"} if preference else {"messages"}
    wanted = FIELDS if preference else ("messages", "images")
    theirs = {ours: columns.get(ours, ours) for ours in wanted}
    # Images may be absent (text only), but not when their column was named.
    missing = [
        name
        for ours, name in theirs.items()
        if name not in present and (ours in needed or ours in columns)
    ]
    if missing:
        raise SourceError(
            f"{path} has no column {', '.join(missing)} (it has {', '.join(sorted(present))}); "
            "name its columns in data.sources.NAME.columns"
        )
    return {ours: name for ours, name in theirs.items() if name in present}


def _groups_after(file: pq.ParquetFile, skip: int) -> tuple[list[int], int]:
    """Row groups that hold rows from `skip` on, and the number of their first row."""
    row = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row + size > skip:
            return list(range(group, file.num_row_groups)), row
        row += size
    return [], row
