"""Which images are accepted, and in which form they are stored."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.schema.data import ImageLimits
from data_shards import images
from data_shards.image_store import StoredImage, store
from data_shards.images import ImageError
from tests.data_shards import toys

LIMIT = ImageLimits(max_pixels=1_000_000, min_side=4)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of broken metadata


def decoded(stored: StoredImage) -> np.ndarray:
    image = images.decode(stored.data, stored.width * stored.height)
    assert image.size == (stored.width, stored.height)
    return np.asarray(image)


@pytest.mark.parametrize(("form", "extension"), [("JPEG", "jpg"), ("PNG", "png")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_files_keep_their_bytes(form: str, extension: str, mode: str) -> None:
    data = toys.encoded(toys.picture(0, 20, 30).convert(mode), form)
    stored = store(data, LIMIT)
    assert (stored.data, stored.extension) == (data, extension)
    assert (stored.height, stored.width) == (20, 30)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    picture = toys.picture(0, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = store(toys.encoded(picture, "PNG", exif=exif), LIMIT)
    from PIL import ImageOps

    upright = Image.open(io.BytesIO(toys.encoded(picture, "PNG", exif=exif)))
    assert np.array_equal(decoded(stored), np.asarray(ImageOps.exif_transpose(upright)))
    assert (stored.width, stored.height) == ((20, 30) if orientation >= 5 else (30, 20))


def test_broken_exif_is_ignored() -> None:
    picture = toys.picture(0, 20, 30)
    data = toys.encoded(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert store(data, LIMIT).data == toys.encoded(picture, "JPEG")


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (10, 20, 30, 255)
    stored = store(toys.encoded(Image.fromarray(pixels)), LIMIT)
    assert (decoded(stored)[:, :4] == (10, 20, 30)).all() and (decoded(stored)[:, 4:] == 255).all()


def test_palette_with_transparency() -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.paste(1, (0, 0, 4, 8))
    stored = store(toys.encoded(picture, "PNG", transparency=0), LIMIT)
    assert (decoded(stored)[:, 4:] == 255).all() and (decoded(stored)[:, :4] == (0, 200, 0)).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    stored = store(toys.encoded(Image.fromarray(grey)), LIMIT)
    assert np.array_equal(decoded(stored)[..., 0], grey >> 8)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("CMYK", "JPEG"), ("RGB", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("1", "PNG")],
)
def test_everything_else_becomes_png_of_what_pillow_shows(mode: str, form: str) -> None:
    data = toys.encoded(toys.picture(0, 20, 30).convert(mode), form)
    stored = store(data, LIMIT)
    assert stored.extension == "png" and stored.data.startswith(b"\x89PNG")
    shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded(stored), shown)


def test_float_images_are_refused() -> None:
    data = toys.encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="mode F"):
        store(data, LIMIT)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with pytest.raises(ImageError, match="are more than"):
        store(png_header(20_000, 20_000), LIMIT)
    with pytest.raises(ImageError, match="1001x1000 px are more than"):
        store(png_header(1001, 1000), LIMIT)


@pytest.mark.parametrize("size", [(3, 100), (100, 3), (1, 1)])
def test_thin_images_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="min_side=4 px"):
        store(toys.encoded(Image.new("RGB", size)), LIMIT)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(form: str) -> None:
    data = toys.encoded(toys.picture(0, 64, 64), form)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError):
            store(data[: int(len(data) * share)], LIMIT)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"GIF89a", b"%PDF-1.4", b"<svg></svg>"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a readable image"):
        store(data, LIMIT)


def test_random_damage_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(toys.encoded(toys.picture(0, 24, 24), form), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[generator.integers(0, len(damaged), 8)] = generator.integers(0, 256, 8)
            try:
                store(damaged.tobytes(), LIMIT)
            except ImageError:
                pass


def test_no_file_is_opened_by_image_bytes(tmp_path: Path) -> None:
    """Formats that name other files or call programs (EPS, FPX, ...) are not among the known."""
    data = toys.encoded(toys.picture(0, 8, 8), "EPS")
    with pytest.raises(ImageError):
        store(data, LIMIT)
