"""Images from outside: checked in full once, when a data set is built, and put in a plain form.

An 8-bit RGB or grey JPEG or PNG keeps its pixels as they are coded; whatever plain decoding would
not show as people see it (EXIF rotation, transparency, palette, CMYK, 16 bit) becomes PNG, which
loses nothing. So the loader only ever converts to RGB, and sees what transformers' processor would.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from conf.schema.data import ImageLimits
from data_shards.difference_hash import difference_hash
from data_shards.images import ImageError

# Not formats that name other files or call programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class StoredImage:
    """What goes into the shard: `data` decodes to `width` x `height` RGB pixels."""

    data: bytes
    extension: str  # jpg or png
    width: int
    height: int
    hash: bytes  # 32 bytes: difference hash of the upright picture
    pixels: bytes | None = None  # 16 bytes: digest of the RGB pixels, where they were decoded


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _store(data, limits)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"not a readable image: {reason}") from None


def _store(data: bytes, limits: ImageLimits) -> StoredImage:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(image.width, image.height, limits)
    plain = (
        image.format in ("JPEG", "PNG")
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
        and _orientation(image) == 1
    )
    if plain:
        image.load()
        extension = "jpg" if image.format == "JPEG" else "png"
        fingerprint = difference_hash(image.convert("L"))
        return StoredImage(data, extension, image.width, image.height, fingerprint)
    upright = ImageOps.exif_transpose(_to_rgb(image))
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    fingerprint = difference_hash(upright.convert("L"))
    return StoredImage(buffer.getvalue(), "png", upright.width, upright.height, fingerprint)


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


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
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
