"""A source cut into blocks of consecutive rows, each of which can be read by itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """Rows of one file.

    Attributes:
        first_row: 0-based row of the file.
        offset: byte at which reading starts, where the format has one (not Parquet).
    """

    file: Path
    first_row: int
    rows: int
    offset: int


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a source; may span files.

    Attributes:
        number: of the block, from 0.
        first_number: row number in the data set of its first row, counted over all files.
    """

    number: int
    first_number: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Rows, those that turn out to be blank or bad included."""
        return sum(piece.rows for piece in self.pieces)


@dataclass
class FileScan:
    """What counting found in one file: its rows, and the byte offsets at which blocks begin."""

    rows: int = 0
    offsets: dict[int, int] = field(default_factory=dict)  # row -> byte


@dataclass(frozen=True)
class Starts:
    """Which rows of a file need an offset: its first, and those that begin a block."""

    first_number: int  # row number in the data set of the file's row 0
    block_rows: int

    def following(self, row: int) -> int:
        """The first such row that is not before `row`."""
        if row <= 0:
            return 0
        return row + -(self.first_number + row) % self.block_rows


def cut(
    files: Sequence[Path], block_rows: int, scan: Callable[[Path, Starts], FileScan]
) -> list[Block]:
    """Blocks of `block_rows` rows over all files in order; the last may be shorter."""
    pieces: dict[int, list[Piece]] = {}
    first = 0
    for path in files:
        found = scan(path, Starts(first, block_rows))
        for row, rows in _spans(first, found.rows, block_rows):
            piece = Piece(path, row, rows, _offset(found.offsets, row))
            pieces.setdefault((first + row) // block_rows, []).append(piece)
        first += found.rows
    return [Block(number, number * block_rows, tuple(p)) for number, p in sorted(pieces.items())]


def _spans(first: int, rows: int, block_rows: int) -> list[tuple[int, int]]:
    """(row, rows) of the parts of one file that belong to one block each."""
    spans, row = [], 0
    while row < rows:
        size = min(rows - row, block_rows - (first + row) % block_rows)
        spans.append((row, size))
        row += size
    return spans


def _offset(offsets: Mapping[int, int], row: int) -> int:
    return offsets[row] if offsets else 0
