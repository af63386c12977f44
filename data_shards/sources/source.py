"""A configured source: its files, its blocks, and their rows."""

import glob
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conf.schema.data import FORMATS, SourceConfig
from data_shards.layout_columns import LayoutError, Rules, candidates, find
from data_shards.sources import json_list, jsonl, parquet, webdataset
from data_shards.sources.blocks import Block, FileScan, Piece, Starts, cut
from data_shards.sources.image_roots import ImageRoots
from data_shards.sources.rows import SourceError, SourceRow

_MOST_KEY = 200  # characters of a sample's own key in what people read
_FOOTERS = 8  # read at a time
_SCANS: dict[str, Callable[[Path, Starts], FileScan]] = {
    "jsonl": jsonl.scan,
    "json": json_list.scan,
    "webdataset": webdataset.scan,
}


class Source:
    """One source. Nothing is written and nothing kept but the blocks, in memory.

    Attributes:
        files: sorted by path; rows are numbered over them in this order.
    """

    def __init__(self, name: str, config: SourceConfig, files: Sequence[Path]) -> None:
        self.name, self.config, self.files = name, config, list(files)
        self._columns: Collection[str] = candidates(Rules.of(config))
        self._blocks: dict[int, list[Block]] = {}
        self._rows_of: dict[Path, int] = {}  # of Parquet files
        self._image_roots = ImageRoots(config.image_root, self.files)
        self._folder = Path(os.path.commonpath([path.parent for path in self.files]))

    def blocks(self, block_rows: int) -> list[Block]:
        """All rows as blocks of `block_rows`; counts every file on the first call (footers of
        Parquet, headers of tars, one quick pass over JSON).

        Raises:
            SourceError: a file cannot be read or is damaged as a whole; or no column holds what its
                layout needs.
        """
        if block_rows not in self._blocks:
            if self.config.format == "parquet":
                self._read_footers()
            self._blocks[block_rows] = cut(self.files, block_rows, self._scan)
        return self._blocks[block_rows]

    def rows(self, block: Block) -> Iterator[SourceRow]:
        """The rows of one block, read from where it begins. Blank lines are passed over.

        Raises:
            SourceError: a file cannot be read there.
        """
        return (row for piece in block.pieces for row in self._piece(piece, block))

    def column_names(self, row: SourceRow) -> list[str]:
        """All columns: of the first file where the format has columns, else of this row."""
        if self.config.format == "parquet":
            return list(parquet.footer(self.files[0]).columns)
        return list(row.values)

    def _scan(self, path: Path, starts: Starts) -> FileScan:
        if self.config.format == "parquet":
            return FileScan(self._rows_of[path])
        return _SCANS[self.config.format](path, starts)

    def _read_footers(self) -> None:
        """Rows of each Parquet file; SourceError where its columns fit no layout."""
        rules = Rules.of(self.config)
        with ThreadPoolExecutor(_FOOTERS) as pool:  # they wait for the file system
            for path, found in zip(self.files, pool.map(parquet.footer, self.files), strict=True):
                try:
                    find(found.columns, rules)  # rows would all be refused, one by one
                except LayoutError as error:
                    raise SourceError(f"data.sources.{self.name}: {path}: {error}") from None
                self._rows_of[path] = found.rows

    def _piece(self, piece: Piece, block: Block) -> Iterator[SourceRow]:
        # Row numbers of a piece follow those of the pieces before it.
        before = sum(p.rows for p in block.pieces[: block.pieces.index(piece)])
        first = block.first_number + before - piece.first_row
        folder = self._image_roots.of(piece.file)
        label = piece.file.relative_to(self._folder).as_posix()
        if self.config.format == "webdataset":
            for row, key, record, attached, problem in webdataset.read(piece):
                origin = f"{label}:{key[:_MOST_KEY]}"
                yield SourceRow(first + row, origin, folder, record, problem, attached)
            return
        line = 1 if self.config.format == "jsonl" else 0
        for row, values, problem in self._read(piece):
            yield SourceRow(first + row, f"{label}:{row + line}", folder, values, problem)

    def _read(self, piece: Piece) -> Iterator[tuple[int, dict[str, Any], str | None]]:
        if self.config.format == "parquet":
            return parquet.read(piece, self._columns)
        return jsonl.read(piece) if self.config.format == "jsonl" else json_list.read(piece)


def open_source(name: str, config: SourceConfig) -> Source:
    """The source `name`.

    Raises:
        SourceError: no file matches, its format is unknown, or its settings contradict each other.
    """
    where = f"data.sources.{name}"
    if config.format not in FORMATS:
        raise SourceError(f"{where}.format={config.format!r} is none of {', '.join(FORMATS)}")
    if config.preference and config.layout in ("caption", "texts"):
        raise SourceError(
            f"{where}.preference=true needs chosen and rejected answers, which "
            f"layout={config.layout} does not have"
        )
    files = sorted(Path(path) for path in glob.glob(config.input, recursive=True))
    files = [path for path in files if path.is_file()]
    if not files:
        raise SourceError(
            f"{where}.input={config.input} matches no file; correct the path, or make the source "
            "files first"
        )
    for path in files:
        if not str(path).isprintable():  # it is part of records and reports
            raise SourceError(f"{where}: the name of {str(path)!r} is not printable; rename it")
    return Source(name, config, files)
