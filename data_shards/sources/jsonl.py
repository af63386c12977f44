"""Lines of a JSON Lines file. A line that is not a JSON object is one bad row, not a bad file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_shards.sources import json_text
from data_shards.sources.blocks import FileScan, Piece, Starts
from data_shards.sources.json_text import JsonError
from data_shards.sources.rows import SourceError, open_text

MAX_LINE = json_text.MAX_BYTES
_CHUNK = 1 << 22
_BOM = b"\xef\xbb\xbf"


def scan(path: Path, starts: Starts) -> FileScan:
    """Count the lines, blank ones included.

    Raises:
        SourceError: the file cannot be opened or read.
    """
    found, begin, ended = FileScan(), 0, True
    with open_text(path) as file:
        wanted = 0  # the next line whose offset is asked for
        while chunk := _read(path, file, _CHUNK):
            if found.rows == wanted and ended:
                found.offsets[wanted] = begin
                wanted = starts.following(wanted + 1)
            lines = chunk.count(b"\n")
            if found.rows + lines >= wanted:
                breaks = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
                while found.rows + lines > wanted or (
                    found.rows + lines == wanted and breaks[-1] + 1 < len(chunk)
                ):
                    found.offsets[wanted] = begin + int(breaks[wanted - found.rows - 1]) + 1
                    wanted = starts.following(wanted + 1)
            found.rows += lines
            begin += len(chunk)
            ended = chunk.endswith(b"\n")
    found.rows += not ended
    return found


def read(piece: Piece) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line of the file from 0, record, None), or (line, {}, why it is bad). Blank lines are
    passed over.

    Raises:
        SourceError: the file cannot be read.
    """
    with open_text(piece.file) as file:
        file.seek(piece.offset)
        for row, line in zip(range(piece.rows), _lines(piece.file, file), strict=False):
            number = piece.first_row + row
            if line is None:
                yield number, {}, f"the line has over {MAX_LINE} bytes"
                continue
            if number == 0:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, *_record(line)


def _record(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        return json_text.parse_object(line), None
    except JsonError as error:
        return {}, f"the line: {error}"


def _read(path: Path, file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); restore it") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes | None]:
    """Lines; None stands for one that is too long to be held."""
    try:
        while line := file.readline(MAX_LINE):
            if len(line) < MAX_LINE or line.endswith(b"\n"):
                yield line
                continue
            while rest := file.readline(_CHUNK):
                if rest.endswith(b"\n"):
                    break
            yield None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); restore it") from None
