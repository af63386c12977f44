"""JSON files of one list, as LLaVA's (llava_v1_5_mix665k.json), read without holding them.

Where elements begin and end is found from quotes, backslashes and brackets alone, a chunk at a time
with NumPy; only then is one element parsed. So an element that is not valid is one bad row, while a
file that is cut short, or in which a quote is missing, is found to be damaged as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_shards.sources import json_text
from data_shards.sources.blocks import FileScan, Piece, Starts
from data_shards.sources.json_text import JsonError
from data_shards.sources.rows import SourceError, open_text

_CHUNK = 1 << 22
_QUOTE, _BACKSLASH, _COMMA = b'"'[0], b"\\"[0], b","[0]
_BLANK = b" \t\r\n"
_KIND = np.zeros(256, np.int8)  # what a byte does to the depth; 2 for a comma
for _byte, _delta in (("[", 1), ("{", 1), ("]", -1), ("}", -1), (",", 2)):
    _KIND[ord(_byte)] = _delta


@dataclass(frozen=True)
class _Cut:
    """One chunk inside the list: `ends` are positions in it at which elements end."""

    base: int  # byte of the file at which `data` begins
    data: bytes
    ends: list[int]
    closed: bool  # the last of `ends` is the list's closing bracket


def scan(path: Path, starts: Starts) -> FileScan:
    """Count the elements.

    Raises:
        SourceError: the file cannot be read, is no list, is cut short, or goes on after its list.
    """
    found = FileScan()
    with open_text(path) as file:
        begin = _open_list(path, file)
        wanted, blank, after = 0, True, -1
        for cut in _cuts(path, file, begin):
            position = 0
            for end in cut.ends:
                last = cut.closed and end == cut.ends[-1]
                if last:
                    blank = blank and not cut.data[position:end].strip(_BLANK)
                    after = cut.base + end + 1
                    if blank and not found.rows:
                        break  # an empty list
                if found.rows == wanted:
                    found.offsets[wanted] = begin
                    wanted = starts.following(wanted + 1)
                found.rows += 1
                position, begin, blank = end + 1, cut.base + end + 1, True
            if not cut.closed:
                blank = blank and not cut.data[position:].strip(_BLANK)
        _check_end(path, file, after)
    return found


def read(piece: Piece) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(row of the file, record, None), or (row, {}, why it is bad).

    Raises:
        SourceError: the file cannot be read or is no longer what was counted.
    """
    with open_text(piece.file) as file:
        row, last = piece.first_row, piece.first_row + piece.rows
        held: bytearray | None = bytearray()  # None: too long to be held
        for cut in _cuts(piece.file, file, piece.offset):
            position = 0
            for end in cut.ends:
                if held is not None:
                    held += cut.data[position:end]
                yield row, *_parse(held)
                row, position, held = row + 1, end + 1, bytearray()
                if row == last:
                    return
            if cut.closed:
                break
            if held is not None:
                held += cut.data[position:]
                if len(held) > json_text.MAX_BYTES:
                    held = None
    raise SourceError(f"{piece.file} became shorter while it was read; leave it alone and repeat")


def _parse(element: bytearray | None) -> tuple[dict[str, Any], str | None]:
    if element is None:
        return {}, f"the JSON has over {json_text.MAX_BYTES} bytes"
    try:
        return json_text.parse_object(bytes(element)), None
    except JsonError as error:
        return {}, str(error)


def _open_list(path: Path, file: BinaryIO) -> int:
    """The byte after the opening bracket."""
    head = _read(path, file, 0, 1 << 16)
    bom = 3 if head.startswith(b"\xef\xbb\xbf") else 0
    start = len(head) - len(head[bom:].lstrip(_BLANK))
    first = head[start : start + 1]
    if first == b"[":
        return start + 1
    advice = "if it holds one object a line, set format=jsonl" if first == b"{" else "restore it"
    raise SourceError(f"{path} is not one JSON list (it begins with {first!r}); {advice}")


def _cuts(path: Path, file: BinaryIO, begin: int) -> Iterator[_Cut]:
    """Chunks of the list from `begin`, which is inside it and outside its elements."""
    depth, in_text, escape = 1, False, False
    while data := _read(path, file, begin, _CHUNK):
        codes = np.frombuffer(data, np.uint8)
        quotes, escape = _unescaped(np.flatnonzero(codes == _QUOTE), codes, escape)
        marks = np.flatnonzero(_KIND[codes])
        outside = (np.searchsorted(quotes, marks) + in_text) % 2 == 0
        marks = marks[outside]
        in_text = bool((len(quotes) + in_text) % 2)
        kinds = _KIND[codes[marks]].astype(np.int64)
        depths = depth + np.cumsum(np.where(kinds == 2, 0, kinds))
        depth = int(depths[-1]) if len(depths) else depth
        closing = np.flatnonzero(depths == 0)
        if len(closing):
            stop = int(closing[0]) + 1
            ends = marks[:stop][(depths[:stop] == 1) & (kinds[:stop] == 2)].tolist()
            yield _Cut(begin, data, [*ends, int(marks[stop - 1])], True)
            return
        yield _Cut(begin, data, marks[(depths == 1) & (kinds == 2)].tolist(), False)
        begin += len(data)
    raise SourceError(
        f"{path} ends inside its list (byte {begin}): it was cut short, or a quote or bracket is "
        "missing; restore it"
    )


def _unescaped(quotes: np.ndarray, codes: np.ndarray, escape: bool) -> tuple[np.ndarray, bool]:
    """Quotes that no odd run of backslashes precedes, and whether the chunk ends in such a run.

    `escape`: the chunk before ended in one, so this one's first byte is escaped.
    """
    slashes = np.flatnonzero(codes == _BACKSLASH)
    if escape:
        if len(quotes) and quotes[0] == 0:
            quotes = quotes[1:]
        elif len(slashes) and slashes[0] == 0:
            slashes = slashes[1:]
    if not len(slashes):
        return quotes, False
    first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of each run, index in `slashes`
    run = np.repeat(slashes[first], np.diff(first, append=len(slashes)))
    odd = (slashes - run) % 2 == 0  # an odd run ends here
    at = np.searchsorted(slashes, quotes - 1)
    at = np.minimum(at, len(slashes) - 1)
    escaped = (slashes[at] == quotes - 1) & odd[at]
    return quotes[~escaped], bool(slashes[-1] == len(codes) - 1 and odd[-1])


def _check_end(path: Path, file: BinaryIO, after: int) -> None:
    while data := _read(path, file, after, _CHUNK):
        if data.strip(_BLANK):
            raise SourceError(
                f"{path} goes on after its list (byte {after}); if it holds one list a line or "
                "several lists, write it as one list or as JSON Lines"
            )
        after += len(data)


def _read(path: Path, file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); restore it") from None
