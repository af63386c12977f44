"""Images from outside: checked in full once, when a data set is built, and put in a plain form.

An 8-bit RGB or grey JPEG or PNG that stands upright keeps its pixels as they are coded and loses
its metadata; whatever plain decoding would not show as people see it (EXIF rotation, transparency,
palette, CMYK, 16 bit) and every other format becomes PNG, which loses nothing. So the loader only
ever converts to RGB, and sees what transformers' processor would see.
"""

import functools
import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from conf.schema.data import ImageLimits
from data_shards import jpeg_metadata, png_metadata
from data_shards.difference_hash import MIN_HEIGHT, MIN_WIDTH, difference_hash
from data_shards.images import ImageError
from data_shards.orientation import orientation, upright

# Not formats that name other files or call programs.
_OTHERS = ("WEBP", "GIF", "BMP", "TIFF")
# A JPEG is decoded at the smallest of libjpeg's scales that is enough for the hash: every coded bit
# is read, few pixels are computed.
_HASHED = {"min_width": MIN_WIDTH, "min_height": MIN_HEIGHT}
_LEVEL = 4  # of 9: files of photographs are 2 % larger than with 6, and take half the time
_GREY_MODES = ("1", "L")


@dataclass(frozen=True)
class StoredImage:
    """What goes into the shard: `data` decodes to `width` x `height` RGB pixels.

    Attributes:
        data: bytes of a JPEG or PNG file without metadata.
        extension: jpg or png.
        hash: 32 bytes, difference hash of the upright picture.
        pixels: 16 bytes, digest of size and RGB pixels; None for a JPEG, whose pixels are not
            computed.
    """

    data: bytes
    extension: str
    width: int
    height: int
    hash: bytes
    pixels: bytes | None = None

    @functools.cached_property
    def sha256(self) -> bytes:
        """SHA-256 of `data`."""
        return hashlib.sha256(self.data).digest()


def store(data: bytes, limits: ImageLimits) -> StoredImage:
    """Check one image and choose the form in which it is stored.

    Raises:
        ImageError: unreadable, truncated, or beyond `limits`, which are looked at before any pixel
            is decoded.
    """
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"{len(data)} bytes are more than data.images.max_bytes={limits.max_bytes}"
        )
    try:
        if data[:2] == b"\xff\xd8":
            return _store_jpeg(data, limits)
        if data[:4] == b"\x89PNG":
            return _store_png(data, limits)
        return _store_other(data, limits)
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"not a readable image: {reason}") from None


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """ImageError if a picture of `width` x `height` px is beyond `limits`."""
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{width}x{height} px are more than data.images.max_pixels={limits.max_pixels}"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(
            f"{width}x{height} px: a side is under data.images.min_side={limits.min_side} px"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(
            f"{width}x{height} px: one side is over data.images.max_aspect={limits.max_aspect:g} "
            "times the other"
        )


def _store_jpeg(data: bytes, limits: ImageLimits) -> StoredImage:
    parts = jpeg_metadata.take_apart(data)
    check_size(parts.width, parts.height, limits)
    turn = orientation(parts.exif, parts.xmp)
    try:
        # Strict: what libjpeg only warns of (missing or superfluous coded bytes) is an error.
        grey = simplejpeg.decode_jpeg(parts.bare, "GRAY", strict=True, **_HASHED)[:, :, 0]
    except ValueError as error:
        if "subsampling" not in str(error):
            raise
        # A good JPEG, but with sampling factors that TurboJPEG has no name for.
        return _as_png(_open(parts.bare, ("JPEG",), limits), turn)
    if parts.components < 4 and turn == 1:
        picture = _scaled_size(parts.width, parts.height, grey.shape)
        fingerprint = difference_hash(Image.fromarray(grey), picture)
        return StoredImage(parts.bare, "jpg", parts.width, parts.height, fingerprint)
    return _as_png(_open(parts.bare, ("JPEG",), limits), turn)


def _scaled_size(width: int, height: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """What of a picture decoded at n/8 of its size is picture: libjpeg rounds sides up."""
    for eighths in range(1, 9):
        if shape == (-(-height * eighths // 8), -(-width * eighths // 8)):
            return width * eighths / 8, height * eighths / 8
    raise ImageError(f"not a readable image: decoded to {shape[1]}x{shape[0]} px")


def _store_png(data: bytes, limits: ImageLimits) -> StoredImage:
    parts = png_metadata.take_apart(data)
    check_size(parts.width, parts.height, limits)
    image = _open(png_metadata.unpacked(parts), ("PNG",), limits)
    turn = orientation(parts.exif, parts.xmp)
    if parts.transparent is not None and parts.colour == png_metadata.RGB and parts.depth == 16:
        raise ImageError("a 16-bit PNG with a transparent colour; convert the image to 8 bit")
    if parts.transparent is not None and parts.colour == png_metadata.GREY and parts.depth < 8:
        # Pillow spreads 2 and 4 bits over 0..255, but not the grey that stands for transparency.
        image.info["transparency"] = parts.transparent[1] * (255 // (2**parts.depth - 1))
    plain = parts.colour in (png_metadata.GREY, png_metadata.RGB) and parts.depth == 8
    if not plain or parts.transparent is not None or turn != 1:
        return _as_png(image, turn)
    return _stored(parts.bare, image)


def _store_other(data: bytes, limits: ImageLimits) -> StoredImage:
    if data[:4] == b"RIFF":
        # Pillow makes room for two pictures of the stated size on opening.
        check_size(*_webp_size(data), limits)
    image = _open(data, _OTHERS, limits)
    if image.format == "TIFF":
        return _as_png(image, 1)  # Pillow turns it on loading
    return _as_png(image, orientation(image.info.get("exif", b""), image.info.get("xmp", b"")))


def _open(data: bytes, formats: tuple[str, ...], limits: ImageLimits) -> Image.Image:
    """The first frame, decoded; its size is checked before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(f"more pixels than Pillow takes for safe: {error}") from None
        check_size(image.width, image.height, limits)
        image.load()
    return image


def _as_png(image: Image.Image, turn: int) -> StoredImage:
    plain = upright(_plain(image), turn)
    plain.info.clear()  # Pillow would write profiles and the like
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", compress_level=_LEVEL)
    return _stored(buffer.getvalue(), plain)


def _stored(data: bytes, image: Image.Image) -> StoredImage:
    """`data` is a PNG of the picture, `image` its pixels: L or RGB."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.convert("RGB").tobytes())
    fingerprint = difference_hash(image.convert("L"))
    return StoredImage(data, "png", image.width, image.height, fingerprint, digest.digest()[:16])


def _plain(image: Image.Image) -> Image.Image:
    """Any mode to L or RGB: transparency on white, 16 bits by their high byte, which is what Pillow
    does itself where there are three colours."""
    if image.mode.startswith("I;16"):
        return _eight_bit(image)
    if image.mode in ("I", "F"):
        raise ImageError(f"mode {image.mode} has no known range; convert the image to 8 bit")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits, inverted = tags.get(258, (16,)), tags.get(262, 1) == 0
    if tuple(bits) != (16,):
        raise ImageError(f"a TIFF of {bits[0]} bits; convert the image to 8 bit")
    grey = np.asarray(image).astype(np.uint16)
    levels = (grey >> 8).astype(np.uint8)
    if inverted:  # white is 0; Pillow minds that at 8 bits only
        levels = 255 - levels
    transparent = image.info.get("transparency")
    if transparent is not None:
        levels[grey == transparent] = 255
    return Image.fromarray(levels)


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a WebP file states (RFC 9649, 2.5 to 2.7)."""
    kind, content = data[12:16], data[20:30]
    if data[8:12] == b"WEBP" and len(content) == 10:
        if kind == b"VP8X":
            return (
                1 + int.from_bytes(content[4:7], "little"),
                1 + int.from_bytes(content[7:10], "little"),
            )
        if kind == b"VP8L" and content[0] == 0x2F:
            bits = int.from_bytes(content[1:5], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
            width, height = (
                int.from_bytes(content[6:8], "little"),
                int.from_bytes(content[8:], "little"),
            )
            return width & 0x3FFF, height & 0x3FFF
    raise ImageError("not a readable image: a RIFF file, but no WebP picture")
