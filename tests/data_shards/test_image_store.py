"""What is kept of an image and how damage shows; odd and hostile files are in tests/.../hostile."""

import numpy as np
import pytest
import simplejpeg
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


def test_equal_pixels_have_equal_digests() -> None:
    picture = toys.picture(0, 20, 30)
    stored = [
        store(toys.encoded(picture, form, **options), LIMIT)
        for form, options in (
            ("PNG", {}),
            ("PNG", {"compress_level": 1}),
            ("WEBP", {"lossless": True}),
            ("BMP", {}),
        )
    ]
    assert len({image.pixels for image in stored}) == 1 and stored[0].data != stored[1].data
    grey = picture.convert("L")
    one, other = (store(toys.encoded(image), LIMIT) for image in (grey, grey.convert("RGB")))
    assert one.pixels == other.pixels != stored[0].pixels
    assert store(toys.encoded(picture, "JPEG"), LIMIT).pixels is None


def test_random_damage_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = np.frombuffer(toys.encoded(toys.picture(0, 24, 24), form), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[generator.integers(0, len(damaged), 8)] = generator.integers(0, 256, 8)
            try:
                stored = store(damaged.tobytes(), LIMIT)
            except ImageError:
                continue
            decoded(stored)  # what is accepted does decode, to the size that is stated


def test_no_bit_of_a_png_flips_unseen() -> None:
    picture = toys.picture(0, 24, 24)
    whole = toys.encoded(picture)
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            stored = store(bytes(damaged), LIMIT)
        except ImageError:
            continue
        assert np.array_equal(decoded(stored), np.asarray(picture)), bit


@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_decode_sees_all_damage_that_a_full_one_sees(progressive: bool) -> None:
    """Which is part of it: many flipped bits give another good JPEG, and only a checksum tells."""
    picture = toys.picture(0, 60, 80).resize((320, 240))
    whole = toys.encoded(picture, "JPEG", quality=90, progressive=progressive)
    start = whole.index(b"\xff\xda") + 14
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        data = bytearray(whole)
        at = int(generator.integers(start, len(whole) - 10))
        data[at : at + 2] = generator.bytes(2)
        try:
            simplejpeg.decode_jpeg(bytes(data), strict=True)
        except ValueError:
            refused += 1
            with pytest.raises(ImageError):
                store(bytes(data), LIMIT)
        else:
            store(bytes(data), LIMIT)
    assert 0 < refused < 40


def test_pillow_is_never_asked_to_open_other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some formats name other files or call programs (EPS: Ghostscript)."""
    asked: list[str] = []
    opened = Image.open

    def watched(file: object, **options: object) -> Image.Image:
        asked.extend(options["formats"])
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", watched)
    data = toys.encoded(toys.picture(0, 8, 8), "EPS")
    with pytest.raises(ImageError):
        store(data, LIMIT)
    assert asked and not {"EPS", "FPX", "MIC", "WMF", "PSD"} & set(asked)
