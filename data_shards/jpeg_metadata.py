"""JPEG files cut into segments: what decides pixels is kept, byte for byte, all else is left out.

After ITU-T T.81 (annex B) and T.871 (JFIF). Left out are EXIF, XMP, ICC profiles (neither Pillow's
`convert` nor libjpeg applies them), comments, thumbnails, further pictures and whatever follows the
end of the picture. Kept are the segments of the coding, and those that tell libjpeg which colours
the components are: JFIF, without its thumbnail, and Adobe.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_shards.images import ImageError

# A progressive file of a few kilobytes may hold thousands of scans over the whole picture
# (libjpeg-turbo, "Two issues with the JPEG standard"); encoders write about ten.
MAX_SCANS = 100
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive with Huffman codes
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}
_TABLES = {0xC4, 0xDB, 0xDD}  # Huffman, quantisation, restart interval
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# A marker among coded bytes: 0xFF, but not stuffed (0x00), not a restart.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass
class JpegParts:
    """A JPEG file taken apart.

    Attributes:
        bare: the file without metadata, same pixels.
        width, height: px as coded, before any rotation.
        components: 1 grey, 3 colour, 4 CMYK or YCCK.
        exif, xmp: contents of those segments, empty where there are none.
    """

    bare: bytes = b""
    width: int = 0
    height: int = 0
    components: int = 0
    scans: int = 0
    exif: bytes = b""
    xmp: bytes = b""
    kept: list[bytes | memoryview] = field(default_factory=list)


def take_apart(data: bytes) -> JpegParts:
    """Cut a JPEG file into what is coded and what is told about it; no pixel is decoded.

    Raises:
        ImageError: not a whole JPEG file, or one that not every decoder reads (12 bits, lossless,
            arithmetic, two or over four components).
    """
    parts, view = JpegParts(kept=[b"\xff\xd8"]), memoryview(data)
    for marker, start, stop in _segments(data):
        segment: bytes | memoryview = view[start:stop]
        content = b"" if marker == _SCAN else data[start + 4 : stop]  # coded bytes are many
        if marker in _FRAMES:
            _read_frame(parts, content)
        elif marker in _OTHER_FRAMES:
            raise ImageError("a lossless, hierarchical or arithmetic JPEG; few decoders read it")
        elif marker == _SCAN:
            parts.scans += 1
            if not parts.width:
                raise ImageError("a JPEG with a scan before its size")
            if parts.scans > MAX_SCANS:
                raise ImageError(f"a JPEG with over {MAX_SCANS} scans, a bomb")
        elif marker in _TABLES:
            pass
        elif marker == 0xE0 and content[:5] == b"JFIF\0" and len(content) >= 14:
            segment = b"\xff\xe0\0\x10" + content[:12] + b"\0\0"  # 0 x 0 px of thumbnail
        elif marker == 0xEE and content[:5] == b"Adobe" and len(content) >= 12:
            pass
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            if marker == 0xE1 and content.startswith(_EXIF):
                # A block over 64 KiB goes on in the next segment, as Pillow reads it.
                parts.exif += content[len(_EXIF) :]
            elif marker == 0xE1 and content.startswith(_XMP):
                parts.xmp = content[len(_XMP) :]
            continue
        else:
            raise ImageError(f"a JPEG with marker 0x{marker:02X}, which few decoders read")
        parts.kept.append(segment)
    if not parts.scans:
        raise ImageError("a JPEG without a scan")
    parts.kept.append(b"\xff\xd9")
    parts.bare = b"".join(parts.kept)
    return parts


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment between the start and the end of the picture; a scan
    takes its coded bytes along. Fill bytes before markers are passed over."""
    if data[:3] != b"\xff\xd8\xff":
        raise ImageError("not a JPEG file")
    position = 2
    while True:
        if data[position : position + 1] != b"\xff":
            raise ImageError(_broken(data, position))
        while data[position + 1 : position + 2] == b"\xff":
            position += 1
        if data[position + 1 : position + 2] == bytes([_END]):
            return
        if position + 4 > len(data):
            raise ImageError(_broken(data, len(data)))
        marker = data[position + 1]
        if marker in (0x00, 0x01, _START) or 0xD0 <= marker <= 0xD7:
            raise ImageError(f"a JPEG with marker 0x{marker:02X} at byte {position}, out of place")
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        stop = position + 2 + length
        if length < 2 or stop > len(data):
            raise ImageError(_broken(data, len(data) if length >= 2 else position))
        if marker == _SCAN:
            found = _MARKER.search(data, stop)
            if found is None:
                raise ImageError("truncated: a JPEG without its end marker")
            stop = found.start()
            while data[stop - 1 : stop] == b"\xff":  # fill bytes belong to the marker
                stop -= 1
        yield marker, position, stop
        position = stop


def _read_frame(parts: JpegParts, content: bytes) -> None:
    if parts.width:
        raise ImageError("a JPEG with two sizes")
    if len(content) < 6 or len(content) != 6 + 3 * content[5]:
        raise ImageError("a JPEG whose frame header is damaged")
    parts.height = int.from_bytes(content[1:3], "big")
    parts.width = int.from_bytes(content[3:5], "big")
    parts.components = content[5]
    if content[0] != 8:
        raise ImageError(f"a JPEG of {content[0]} bits; convert the image to 8 bit")
    if parts.components not in (1, 3, 4):
        raise ImageError(f"a JPEG of {parts.components} components; 1, 3 and 4 are known")
    if not parts.width or not parts.height:
        raise ImageError("a JPEG that does not state its size in its frame header")


def _broken(data: bytes, position: int) -> str:
    if position >= len(data):
        return "truncated: a JPEG that ends within its headers or without its end marker"
    return f"a JPEG with no marker at byte {position}, where one must be"
