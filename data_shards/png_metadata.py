"""PNG files cut into chunks: what decides pixels is kept, byte for byte, all else is left out.

After the PNG specification, third edition. Kept are the critical chunks (IHDR, PLTE, IDAT, IEND)
and transparency (tRNS), each with its CRC-32 checked; left out are text, EXIF, times, colour
profiles and gamma (Pillow's `convert` applies neither), the further frames of an animation, and
whatever follows the end of the picture.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from data_shards.images import ImageError

GREY, RGB, PALETTE = 0, 2, 3  # colour types without alpha
_DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    4: (8, 16),  # grey with alpha
    6: (8, 16),  # RGB with alpha
}
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
# Adam7: left and top pixel of each pass, and the steps to the next ones.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT = 1 << 20  # bytes that a compressed text may have
_NAME = re.compile(rb"[A-Za-z]{4}")


@dataclass
class PngParts:
    """A PNG file taken apart.

    Attributes:
        bare: the file without metadata, same pixels.
        width, height: px as coded, before any rotation.
        depth, colour, interlaced: bits of a sample, colour type and Adam7, as in IHDR.
        transparent: content of tRNS, None where there is none.
        coded: the compressed rows.
        exif, xmp: contents of those chunks, empty where there are none.
    """

    bare: bytes = b""
    width: int = 0
    height: int = 0
    depth: int = 0
    colour: int = 0
    interlaced: bool = False
    transparent: bytes | None = None
    coded: bytes = b""
    exif: bytes = b""
    xmp: bytes = b""


def take_apart(data: bytes) -> PngParts:
    """Cut a PNG file into what is coded and what is told about it; no pixel is decoded.

    Raises:
        ImageError: not a whole PNG file, a kept chunk whose CRC-32 is wrong, or a critical chunk
            that nobody knows.
    """
    parts, kept = PngParts(), [_SIGNATURE]
    names: list[bytes] = []
    coded: list[bytes] = []
    for name, start, stop in _chunks(data):
        content = data[start + 8 : stop - 4]
        if name == b"IHDR":
            _read_header(parts, content)
        elif name == b"IDAT":
            coded.append(content)
        elif name == b"tRNS":
            parts.transparent = content
        elif name == b"eXIf":
            parts.exif = content
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _read_text(parts, name, content)
        elif not name[0] & 0x20 and name not in (b"PLTE", b"IEND"):
            raise ImageError(f"a PNG with the unknown critical chunk {name.decode()}")
        if not name[0] & 0x20 or name == b"tRNS":
            if zlib.crc32(data[start + 4 : stop - 4]) != int.from_bytes(data[stop - 4 : stop]):
                raise ImageError(f"a PNG whose chunk {name.decode()} at byte {start} is damaged")
            # IDAT after IDAT only: another chunk between them is an error in PNG.
            if names[-1:] != [name] or name != b"IDAT":
                names.append(name)
            kept.append(data[start:stop])
    _check_order(names)
    parts.bare, parts.coded = b"".join(kept), b"".join(coded)
    return parts


def unpacked(parts: PngParts) -> bytes:
    """The file with its rows uncompressed, for a decoder: they are all there.

    Pillow leaves rows black that the compressed data do not have, and says nothing.

    Raises:
        ImageError: rows are missing or superfluous, or the compressed data are damaged.
    """
    expected = _row_bytes(parts)
    stream = zlib.decompressobj()
    try:
        rows = stream.decompress(parts.coded, expected + 1)
        if len(rows) == expected and not stream.eof:  # the checksum comes last
            rows += stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise ImageError(f"a PNG whose compressed rows are damaged ({error})") from None
    if len(rows) != expected or not stream.eof:
        raise ImageError(
            f"a PNG whose compressed rows have {'over' if len(rows) > expected else 'not all of'} "
            f"the {expected} bytes that its size asks for"
        )
    chunks = list(_chunks(parts.bare))
    first = next(start for name, start, _ in chunks if name == b"IDAT")
    last = chunks[-1][1]
    packed = zlib.compress(rows, 0)
    del rows  # large
    crc = zlib.crc32(packed, zlib.crc32(b"IDAT"))
    head, tail = parts.bare[:first], parts.bare[last:]
    return b"".join((head, len(packed).to_bytes(4), b"IDAT", packed, crc.to_bytes(4), tail))


def _row_bytes(parts: PngParts) -> int:
    """Bytes of all rows, each with its filter's number in front."""
    bits = parts.depth * _CHANNELS[parts.colour]
    passes = _PASSES if parts.interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        width = -((left - parts.width) // across)
        height = -((top - parts.height) // down)
        if width > 0 and height > 0:
            total += height * (1 + (width * bits + 7) // 8)
    return total


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, stop) of each chunk up to IEND; start is that of its length."""
    if not data.startswith(_SIGNATURE):
        raise ImageError("not a PNG file")
    position, name = len(_SIGNATURE), b""
    while name != b"IEND":
        stop = position + 12 + int.from_bytes(data[position : position + 4])
        if position + 12 > len(data) or stop > len(data):
            raise ImageError("truncated: a PNG without its end chunk")
        name = data[position + 4 : position + 8]
        if not _NAME.fullmatch(name):
            raise ImageError(f"a PNG with no chunk at byte {position}, where one must be")
        yield name, position, stop
        position = stop


def _read_header(parts: PngParts, content: bytes) -> None:
    if len(content) != 13:
        raise ImageError("a PNG whose header is damaged")
    parts.width, parts.height = int.from_bytes(content[:4]), int.from_bytes(content[4:8])
    parts.depth, parts.colour, parts.interlaced = content[8], content[9], content[12] != 0
    if parts.depth not in _DEPTHS.get(parts.colour, ()) or any(content[10:12]) or content[12] > 1:
        raise ImageError("a PNG whose header states a coding that does not exist")
    if not parts.width or not parts.height:
        raise ImageError("a PNG with a side of 0 px")


def _check_order(names: list[bytes]) -> None:
    expected = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    if len(set(names)) != len(names) or names != [name for name in expected if name in names]:
        raise ImageError("a PNG whose chunks are twice there or out of order")
    if not {b"IHDR", b"IDAT", b"IEND"} <= set(names):
        raise ImageError("a PNG that lacks a chunk it needs")


def _read_text(parts: PngParts, kind: bytes, content: bytes) -> None:
    """Take note of EXIF as ImageMagick writes it, and of XMP; of nothing else."""
    keyword, _, text = content.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp" and kind == b"iTXt" and text[:1] == b"\0":
        parts.xmp = text
    elif keyword == b"Raw profile type exif" and kind in (b"tEXt", b"zTXt") and not parts.exif:
        try:
            if kind == b"zTXt":
                text = zlib.decompressobj().decompress(text[1:], _MAX_TEXT)
            parts.exif = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
        except (zlib.error, ValueError):  # broken metadata says nothing about the pixels
            pass
