"""One tar header at a time, strictly: USTAR, GNU and PAX, as POSIX.1-2017 `pax` and GNU tar's
manual ("Basic Tar Format") define them.

A header that two readers could read differently is refused, not guessed at.
"""

import re
from dataclasses import dataclass

BLOCK = 512  # bytes; tar's unit
MOST_EXTENDED = 1 << 20  # bytes of one long name or PAX header; more is an attack, not a name

_OCTAL = re.compile(rb" *([0-7]+)[ \0]*\Z")
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ")
_USTAR, _GNU, _V7 = b"ustar\x0000", b"ustar  \0", b"\0" * 8
REGULAR = (b"0", b"\0", b"7")  # 7: "contiguous", which everyone reads as a regular file
DIRECTORY = b"5"
# Entries of a name alone: links, devices, pipes. Readers take no content for these.
NAMED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
}
LONG_NAME, LONG_LINK = b"L", b"K"
PAX, PAX_GLOBAL = b"x", b"g"
VOLUME_LABEL = b"V"


class HeaderError(ValueError):
    """A header that is damaged or means different things to different readers; says why."""


@dataclass(frozen=True)
class Header:
    """What 512 bytes say.

    Attributes:
        kind: the type flag, one byte.
        name: bytes, prefix included.
        size: of the content, bytes.
        twofold: some readers (Python's tarfile) take another name from it.
    """

    kind: bytes
    name: bytes
    size: int
    twofold: bool


def parse_header(block: bytes) -> Header:
    """One header block that is not all zeros.

    Raises:
        HeaderError: its checksum, magic or a number is wrong.
    """
    if not block[124:136].strip(b"\0 ") and not block[148:156].strip(b"\0 "):
        raise HeaderError("no tar header (no size and no checksum in it)")
    said = _number(block[148:156], "checksum")
    blanked = block[:148] + b" " * 8 + block[156:]
    counted = sum(blanked)
    # Old Suns counted bytes as signed.
    if said != counted and said != counted - 256 * sum(byte > 127 for byte in blanked):
        raise HeaderError(f"its checksum says {said}, its bytes add up to {counted}")
    magic, kind, name = block[257:265], block[156:157], block[:100].split(b"\0")[0]
    if magic not in (_USTAR, _GNU, _V7):
        raise HeaderError(f"unknown magic {magic!r}, neither USTAR nor GNU")
    prefix = block[345:500].split(b"\0")[0]
    if prefix and magic == _USTAR:
        name = prefix + b"/" + name
    twofold = bool(prefix) and magic != _USTAR
    return Header(kind, name, _number(block[124:136], "size"), twofold)


def parse_pax(content: bytes) -> dict[bytes, bytes]:
    """Records of a PAX header, "LENGTH KEY=VALUE\\n" each.

    Raises:
        HeaderError: a record is malformed, or a key stands twice.
    """
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        match = _RECORD.match(content, at)
        end = at + int(match[1]) if match else 0
        if match is None or end > len(content) or content[end - 1 : end] != b"\n":
            raise HeaderError("its PAX records are malformed")
        key, equals, value = content[match.end() : end - 1].partition(b"=")
        if not equals or not key or key in records:
            raise HeaderError("its PAX records are malformed or stand twice")
        records[key] = value
        at = end
    return records


def long_name(content: bytes) -> bytes:
    """The name in a GNU long-name header, which a NUL ends.

    Raises:
        HeaderError: there is none, or no NUL (Python reads on, into the padding), or something
            after it.
    """
    name, end, rest = content.partition(b"\0")
    if not name or not end or rest.strip(b"\0"):
        raise HeaderError("its GNU long name is empty or does not end in the one NUL")
    return name


def pax_name(records: dict[bytes, bytes]) -> bytes | None:
    """The member's name, if a PAX header gives one.

    Raises:
        HeaderError: an empty one (POSIX: as if it were not there; Python: no name), or a NUL.
    """
    name = records.get(b"path")
    if name is not None and (not name or b"\0" in name):
        raise HeaderError("its PAX name is empty or holds a NUL")
    return name


def pax_size(records: dict[bytes, bytes], header_size: int) -> int:
    """The content's size where a PAX header may override the plain one's.

    Raises:
        HeaderError: not a number, or the two differ although the plain field could hold it.
    """
    text = records.get(b"size")
    if not text:
        return header_size
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise HeaderError(f"its PAX size {text!r} is not a number")
    size = int(text)
    if header_size and header_size != size and size < 8**11:
        raise HeaderError(f"its size is {header_size} in one place and {size} in another")
    return size


def _number(field: bytes, what: str) -> int:
    """Octal digits, or GNU's base 256 for large numbers."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
        if value < 1 << 62:
            return value
    match = _OCTAL.match(field)
    if match is None:
        raise HeaderError(f"its {what} field holds {field!r}, not a number")
    return int(match[1], 8)
