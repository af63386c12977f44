"""Which way up a picture is shown: EXIF orientation, where a picture's metadata states it."""

import re
from collections.abc import Mapping

from PIL import ExifTags, Image

# Value of the tag -> what makes the picture upright (EXIF 2.32, 4.6.4).
TRANSPOSE: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8, the EXIF block before the XMP packet, as `PIL.ImageOps.exif_transpose` has it.

    Metadata that cannot be read says nothing about the pixels: 1.
    """
    if not exif and not xmp:
        return 1
    block = Image.Exif()
    try:
        block.load(exif)
        value = block.get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises almost anything on a broken block
        value = None
    if value is None:
        match = _XMP.search(xmp)
        value = int(match[1]) if match else 1
    return value if isinstance(value, int) and value in TRANSPOSE else 1


def upright(image: Image.Image, value: int) -> Image.Image:
    """The picture turned or mirrored as orientation `value` asks; 1 leaves it."""
    return image.transpose(TRANSPOSE[value]) if value in TRANSPOSE else image
