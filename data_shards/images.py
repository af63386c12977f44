"""Stored images to uint8 tiles at load time, as transformers' slow processor makes them.

Whatever else an image might be was settled when it was stored (`data_shards.image_store`): here it
is only ever converted to RGB. Two ways, one result, bit for bit: `decode` and `write_tiles` are
Pillow's and the definition; `write_tiles_from` goes faster where it can (docs/data/pixels.md).
"""

import io
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from data_shards import jpeg, resize
from models.anyres import AnyresGeometry

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# Below this transformers 4.57.6 may take the height for the channels (facts: 1 or 3 px high).
MIN_SIDE = 4  # px
_KEPT_BYTES = 64 << 20  # the most memory for pixels that a thread keeps between images

T = TypeVar("T")

backend = resize.backend  # "avx512", "avx2" or "pillow"


class ImageError(ValueError):
    """Bytes that are not an acceptable image; the message says why."""


def write_tiles_from(
    data: bytes, height: int, width: int, geometry: AnyresGeometry, out_NCHW: np.ndarray
) -> None:
    """Tiles of one stored image of a known size. Threads may call it at the same time.

    Args:
        data: the encoded image, of `height` x `width` pixels as the manifest says.
        out_NCHW: uint8 [geometry.n_tiles(height, width), 3, tile, tile], contiguous; overwritten.

    Raises:
        ImageError: it does not decode, or has another size or mode. Sizes are compared before
            anything is decoded, so no image takes more memory than the manifest's size does.
    """
    pixels = _pixels(data, height, width)
    instructions = backend()
    if instructions == resize.PILLOW or max(height, width) > resize.MAX_SIDE:
        pixels = pixels[: height * width * 3]
        write_tiles(Image.frombuffer("RGB", (width, height), pixels), geometry, out_NCHW)
    else:
        resize.write_tiles(pixels, height, width, geometry, out_NCHW, instructions)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Stored bytes as an RGB image; ImageError if they do not decode."""
    return _guarded(lambda: _to_rgb(_open(data, max_pixels)))


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


class _Room(threading.local):
    """A thread's memory for the pixels of one image, kept for the next: new pages cost time."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> np.ndarray:
        if n_bytes > _KEPT_BYTES:
            return _aligned(n_bytes)
        if n_bytes > len(self._kept):
            self._kept = _aligned(n_bytes)
        return self._kept[:n_bytes]


def _aligned(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] that begins where a cache line does."""
    room = np.empty(n_bytes + 63, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes]


_room = _Room()


def _pixels(data: bytes, height: int, width: int) -> np.ndarray:
    """uint8 [height * width * 3 + SLACK]: RGB pixels, valid until this thread's next image."""
    size = plain = jpeg.plain_size(data)
    if size is None:
        image = _guarded(lambda: _open(data, sys.maxsize))
        size = image.height, image.width
    if size != (height, width):
        raise ImageError(f"{size[1]}x{size[0]} px, not {width}x{height}")
    n_bytes = height * width * 3
    pixels = _room.take(n_bytes + resize.SLACK)
    if plain is None or not jpeg.decode_into(data, pixels):
        pixels[:n_bytes] = np.asarray(decode(data, height * width)).reshape(-1)
    return pixels


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGB", "L"):
        raise ImageError(f"mode {image.mode} is not what the builder stores")
    return image.convert("RGB")
