"""Lines of a JSON Lines file. A line that is not a JSON object is one bad row, not a bad file."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_shards.sources.rows import FIELDS, SourceError, SourceRow

MAX_LINE = 64 << 20  # bytes
_CHUNK = 1 << 22


def count(path: Path) -> int:
    """Lines of the file, blank ones included."""
    lines, last = 0, b"\n"
    with _open(path) as file:
        while chunk := file.read(_CHUNK):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def rows(
    path: Path, columns: Mapping[str, str], preference: bool, first_number: int, skip: int = 0
) -> Iterator[SourceRow]:
    """Rows from line `skip` (0-based) on; line r gets number `first_number + r`. Blank lines are
    passed over.

    Raises:
        SourceError: the file cannot be opened or read.
    """
    wanted = FIELDS if preference else ("messages", "images")
    theirs = {ours: columns.get(ours, ours) for ours in wanted}
    with _open(path) as file:
        for number, line in enumerate(_lines(path, file)):
            if number < skip or (line is not None and not line.strip()):
                continue
            origin = f"{path.name}:{number + 1}"
            values, problem = _parse(line, theirs)
            yield SourceRow(first_number + number, origin, path.parent, values, problem)


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise SourceError(f"{path} cannot be opened ({error.strerror}); correct the path") from None


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


def _parse(line: bytes | None, theirs: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    if line is None:
        return {}, f"the line has over {MAX_LINE} bytes"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, "the line is not UTF-8"
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON ({error})"
    if not isinstance(record, dict):
        return {}, "the line is not a JSON object"
    return {ours: record.get(name) for ours, name in theirs.items()}, None
