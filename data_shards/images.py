"""Image bytes: checked once at build time, turned into uint8 tiles at load time.

At build time every image is fully decoded; one whose plain decoding would not give the picture
people see (EXIF rotation, transparency, palette, CMYK, 16 bit) is stored again, losslessly, as PNG.
So the loader only ever converts to RGB, and what it sees is what transformers' processor would see.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from models.anyres import AnyresGeometry

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Below this transformers 4.57.6 may take the height for the channels (facts: 1 or 3 px high).
MIN_SIDE = 4  # px
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


T = TypeVar("T")


class ImageError(ValueError):
    """Bytes that are not an acceptable image; the message says why."""


@dataclass(frozen=True)
class StoredImage:
    """What goes into the shard: `data` decodes to `width` x `height` RGB pixels."""

    data: bytes
    extension: str  # jpg or png
    width: int
    height: int


def store(data: bytes, max_pixels: int) -> StoredImage:
    """Check one image and choose the form in which it is stored.

    8-bit RGB or grey JPEG and PNG keep their bytes; everything else becomes PNG.

    Raises:
        ImageError: unreadable, truncated, larger than `max_pixels` (looked at before any
            decoding), or a side under 4 px.
    """

    def read() -> StoredImage:
        image = _open(data, max_pixels)
        orientation = _orientation(image)
        image.load()
        plain = (
            image.format in ("JPEG", "PNG")
            and image.mode in ("RGB", "L")
            and "transparency" not in image.info
            and getattr(image, "n_frames", 1) == 1
            and orientation == 1
        )
        if plain:
            extension = "jpg" if image.format == "JPEG" else "png"
            return StoredImage(data, extension, image.width, image.height)
        upright = _to_rgb(image)
        if orientation in _TRANSPOSE:
            upright = upright.transpose(_TRANSPOSE[orientation])
        buffer = io.BytesIO()
        upright.save(buffer, "PNG")
        return StoredImage(buffer.getvalue(), "png", upright.width, upright.height)

    return _guarded(read)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Stored bytes as an RGB image; ImageError if they do not decode."""

    def read() -> Image.Image:
        image = _open(data, max_pixels)
        if image.mode not in ("RGB", "L"):
            raise ImageError(f"mode {image.mode} is not what the builder stores")
        return image.convert("RGB")

    return _guarded(read)


def write_tiles(image: Image.Image, geometry: AnyresGeometry, out_NCHW: np.ndarray) -> None:
    """Tiles of one RGB image: the squashed base, then the canvas row by row.

    Bit for bit what the slow `LlavaNextImageProcessor` of transformers 4.57.6 has before it
    rescales and normalises: Pillow bicubic, black margins.

    Args:
        out_NCHW: uint8 [geometry.n_tiles(height, width), 3, tile, tile], overwritten.
    """
    side = geometry.tile
    rows, columns = geometry.tile_grid(image.height, image.width)
    base = image.resize((side, side), Image.Resampling.BICUBIC)
    out_NCHW[0] = np.asarray(base).transpose(2, 0, 1)
    new_height, new_width, top, left = geometry.resize_box(image.height, image.width)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    canvas_HWC = np.zeros((rows * side, columns * side, 3), np.uint8)
    canvas_HWC[top : top + new_height, left : left + new_width] = np.asarray(resized)
    tiles = canvas_HWC.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    out_NCHW[1:] = tiles.reshape(rows * columns, 3, side, side)


def tiles(image: Image.Image, geometry: AnyresGeometry) -> np.ndarray:
    """As `write_tiles`, into a new array: uint8 [n_tiles, 3, tile, tile]."""
    n_tiles = geometry.n_tiles(image.height, image.width)
    out_NCHW = np.empty((n_tiles, 3, geometry.tile, geometry.tile), np.uint8)
    write_tiles(image, geometry, out_NCHW)
    return out_NCHW


def _guarded(read: Callable[[], T]) -> T:
    try:
        return read()
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"not a readable image: {reason}") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only; sizes are checked before a pixel is decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width}x{image.height} px are more than data.images.max_pixels={max_pixels}"
        )
    if min(image.size) < MIN_SIDE:
        raise ImageError(f"{image.width}x{image.height} px: a side is under {MIN_SIDE} px")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, 16-bit grey by its high byte (as Pillow does for
    16-bit RGB)."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"mode {image.mode} has no known range; convert the image to 8 bit")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")
