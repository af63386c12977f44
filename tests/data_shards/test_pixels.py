"""The fast ways from stored bytes to tiles, against Pillow: not one bit may differ."""

import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_shards import images, jpeg, resize
from data_shards.images import ImageError
from models.anyres import AnyresGeometry, pinpoints_up_to
from tests.data_shards import toys

try:
    import amalia_pixels

    COMPILED = amalia_pixels.instruction_sets()
except ImportError:
    COMPILED = []
# Small tiles: the same code, more shapes in a second. 50 is no multiple of any vector.
GEOMETRIES = [AnyresGeometry(side, 14, pinpoints_up_to(side, 9)) for side in (32, 50)]
# 16 px: a 64-byte vector is wider than the canvas. 384 px: as in the real model.
SMALL, REAL = (AnyresGeometry(side, 14, pinpoints_up_to(side, 6)) for side in (16, 384))


def shapes(kind: str, generator: np.random.Generator) -> tuple[int, int]:
    low_high = {
        "any": ((1, 400), (1, 400)),
        "tall": ((200, 1500), (1, 120)),
        "wide": ((1, 120), (200, 3000)),
        "tiny": ((1, 9), (1, 9)),
        "one pixel high": ((1, 2), (1, 600)),
        "one pixel wide": ((1, 600), (1, 2)),
        "enlarged": ((4, 60), (4, 60)),
        "just smaller": ((90, 110), (90, 110)),
    }[kind]
    height, width = (int(generator.integers(*bounds)) for bounds in low_high)
    return height, width


def padded(pixels_HWC: np.ndarray) -> np.ndarray:
    """With garbage after the pixels, which must not matter."""
    return np.concatenate([pixels_HWC.reshape(-1), np.full(resize.SLACK, 201, np.uint8)])


def assert_equal_tiles(pixels_HWC: np.ndarray, geometry: AnyresGeometry, instructions: str) -> None:
    height, width, _ = pixels_HWC.shape
    expected_NCHW = images.tiles(Image.fromarray(pixels_HWC), geometry)
    found_NCHW = np.full_like(expected_NCHW, 77)
    resize.write_tiles(padded(pixels_HWC), height, width, geometry, found_NCHW, instructions)
    assert np.array_equal(found_NCHW, expected_NCHW), f"{height}x{width}, {geometry.tile}"


def test_what_is_compiled_is_used() -> None:
    """`make setup` compiles it on x86-64; without a compiler the tests below are skipped."""
    if not COMPILED:
        pytest.skip("amalia_pixels is not compiled, or this processor has no AVX2")
    assert resize.backends() == (*COMPILED, resize.PILLOW)


@pytest.mark.parametrize("instructions", COMPILED)
@pytest.mark.parametrize(
    "kind",
    ["any", "tall", "wide", "tiny", "one pixel high", "one pixel wide", "enlarged", "just smaller"],
)
def test_random_shapes_equal_pillow(kind: str, instructions: str) -> None:
    generator = np.random.default_rng(7)
    for number in range(40):
        height, width = shapes(kind, generator)
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        if number % 2:  # black and white: the most that the sums can overshoot
            pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
        assert_equal_tiles(pixels, GEOMETRIES[number % 3 % 2], instructions)


@pytest.mark.parametrize("instructions", COMPILED)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (768, 1024),  # the canvas keeps its size
        (384, 384),
        (1200, 2047),
        (2048, 1200),  # the vertical pass first, as Pillow 13
        (333, 6000),  # sources too far apart for two vectors
        (40, 65535),
        (65535, 40),
    ],
)
def test_real_tiles_equal_pillow(height: int, width: int, instructions: str) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    assert_equal_tiles(pixels, REAL, instructions)


@pytest.mark.parametrize("instructions", COMPILED)
def test_tiles_narrower_than_a_vector(instructions: str) -> None:
    generator = np.random.default_rng(3)
    for _ in range(40):
        height, width = (int(side) for side in generator.integers(1, 90, 2))
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        assert_equal_tiles(pixels, SMALL, instructions)


@pytest.mark.parametrize("instructions", COMPILED)
def test_sizes_that_do_not_fit_are_refused(instructions: str) -> None:
    rgb = np.zeros(8 * 8 * 3 + resize.SLACK, np.uint8)
    tiles = np.zeros((2, 3, 16, 16), np.uint8)
    good = [instructions, rgb, (8, 8), (16, 16), (0, 0), (1, 1), 16, tiles]
    amalia_pixels.write_tiles(*good)
    frozen = tiles.copy()
    frozen.flags.writeable = False
    for place, value in [
        (0, "sse9"), (1, rgb[:-1]), (2, (9, 8)), (2, (0, 8)), (2, (8, 70_000)), (2, (-8, -8)),
        (3, (17, 16)), (3, (16, 0)), (4, (1, 0)), (4, (0, -1)), (5, (1, 2)), (5, (5000, 5000)),
        (6, 15), (7, tiles[:1]), (7, frozen), (7, tiles[:, :, ::2]),
    ]:  # fmt: skip
        with pytest.raises((ValueError, BufferError)):
            amalia_pixels.write_tiles(*good[:place], value, *good[place + 1 :])


def test_a_pillow_that_resizes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not COMPILED:
        pytest.skip("amalia_pixels is not compiled")
    true_resize = Image.Image.resize

    def horizontal_first(self: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        """As Pillow did up to version 12."""
        across = true_resize(self, (size[0], self.height), resample)
        return true_resize(across, size, resample)

    assert all(resize._equals_pillow(name) for name in COMPILED)
    monkeypatch.setattr(Image.Image, "resize", horizontal_first)
    assert not any(resize._equals_pillow(name) for name in COMPILED)


@pytest.fixture
def undecided() -> Iterator[None]:
    """As in a process that has not chosen yet."""
    caches = (resize._chosen, resize._checked, resize._module)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("undecided")
def test_without_the_compiled_module_pillow_resizes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(resize.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "amalia_pixels", None)
    data = toys.encoded(toys.picture(0, 90, 40), "JPEG")
    for _ in range(3):
        assert np.array_equal(tiles_from(data, 90, 40), tiles_of(data))
    assert resize.backends() == (resize.PILLOW,)
    assert [r.message.split(" (")[0] for r in caplog.records] == ["amalia_pixels is not compiled"]


@pytest.mark.usefixtures("undecided")
def test_a_module_of_other_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(resize.VARIABLE, raising=False)
    other = SimpleNamespace(INTERFACE=resize.INTERFACE + 1, SLACK=resize.SLACK)
    monkeypatch.setitem(sys.modules, "amalia_pixels", other)
    assert resize.backend() == resize.PILLOW
    assert "other sources" in caplog.text and "slower" in caplog.text


@pytest.mark.usefixtures("undecided")
def test_a_backend_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in resize.backends():
        monkeypatch.setenv(resize.VARIABLE, name)
        assert images.backend() == name
    monkeypatch.setenv(resize.VARIABLE, "neon")
    with pytest.raises(ValueError, match="AMALIA_PIXELS=neon, but only .*pillow can be used here"):
        images.backend()


def tiles_from(data: bytes, height: int, width: int) -> np.ndarray:
    shape = (toys.GEOMETRY.n_tiles(height, width), 3, 32, 32)
    out_NCHW = np.full(shape, 77, np.uint8)
    images.write_tiles_from(data, height, width, toys.GEOMETRY, out_NCHW)
    return out_NCHW


def tiles_of(data: bytes) -> np.ndarray:
    """By Pillow alone."""
    return images.tiles(images.decode(data, 1 << 30), toys.GEOMETRY)


def test_jpeg_pixels_equal_pillow() -> None:
    """Subsampling, progressive scans, grey, restart markers, RGB as stored, every edge."""
    generator = np.random.default_rng(5)
    for number in range(120):
        height, width = (int(side) for side in generator.integers(4, 70, 2))
        picture = toys.picture(number, height, width)
        options: dict[str, Any] = {"quality": int(generator.integers(5, 101))}
        options["subsampling"] = ("4:4:4", "4:2:2", "4:2:0")[number % 3]
        options["progressive"] = number % 4 == 0
        options["optimize"] = number % 5 == 0
        if number % 6 == 0:
            options["restart_marker_blocks"] = 3
        if number % 10 == 0:
            options = {"quality": 90, "keep_rgb": True}
        if number % 7 == 0:
            picture, options = picture.convert("L"), {"quality": 80}
        data = toys.encoded(picture, "JPEG", **options)
        assert jpeg.plain_size(data) == (height, width)
        out = np.empty(height * width * 3, np.uint8)
        assert jpeg.decode_into(data, out)
        expected_HWC = np.asarray(images.decode(data, height * width))
        assert np.array_equal(out.reshape(height, width, 3), expected_HWC), options


def test_damaged_jpeg_is_what_pillow_makes_of_it() -> None:
    """Either both refuse, or the tiles are Pillow's: never half a picture of another decoder."""
    generator = np.random.default_rng(1)
    whole = toys.encoded(toys.picture(0, 60, 70), "JPEG", quality=90)
    outcomes = set()
    for number in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        start = 2 if number % 3 == 0 else 700  # headers, or coded pixels
        damaged[generator.integers(start, len(damaged), 3)] = generator.integers(0, 256, 3)
        data = damaged.tobytes()[: len(whole) - (number % 5 == 0) * 400]
        try:
            expected_NCHW = tiles_of(data)
            if images.decode(data, 1 << 30).size != (70, 60):
                raise ImageError
        except ImageError:
            with pytest.raises(ImageError):
                tiles_from(data, 60, 70)
            outcomes.add("refused")
            continue
        assert np.array_equal(tiles_from(data, 60, 70), expected_NCHW)
        fast = jpeg.plain_size(data) and jpeg.decode_into(data, np.empty(60 * 70 * 3, np.uint8))
        outcomes.add("decoded" if fast else "left to Pillow")
    assert outcomes == {"refused", "decoded", "left to Pillow"}


def test_a_side_beyond_the_compiled_limit() -> None:
    data = toys.encoded(toys.picture(0, resize.MAX_SIDE + 1, 4))
    assert np.array_equal(tiles_from(data, resize.MAX_SIDE + 1, 4), tiles_of(data))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_decoded_by_pillow(form: str) -> None:
    data = toys.encoded(toys.picture(0, 70, 41), form)
    assert jpeg.plain_size(data) is None
    assert np.array_equal(tiles_from(data, 70, 41), tiles_of(data))


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_modes_that_are_never_stored_are_refused(mode: str, form: str) -> None:
    data = toys.encoded(toys.picture(0, 40, 50).convert(mode), form)
    with pytest.raises(ImageError, match=f"mode {mode} is not what the builder stores"):
        tiles_from(data, 40, 50)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10", b"text"])
def test_no_image_at_all(data: bytes) -> None:
    with pytest.raises(ImageError, match="not a readable image"):
        tiles_from(data, 40, 50)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_another_size_is_refused_before_anything_is_decoded(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    data = bytearray(toys.encoded(toys.picture(0, 40, 50), form))
    sizes = [(50, 40)]
    if form == "JPEG":  # one that says that it is 65,000 px high and wide
        frame = data.index(b"\xff\xc0") + 5
        data[frame : frame + 4] = struct.pack(">HH", 65_000, 65_000)
        sizes = [(40, 50)]
    monkeypatch.setattr("simplejpeg.decode_jpeg", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for height, width in sizes:
        with pytest.raises(ImageError, match=f"px, not {width}x{height}"):
            tiles_from(bytes(data), height, width)


def test_threads_do_not_share_pixels() -> None:
    sides = [(40 + n, 90 - n) for n in range(40)]
    data = [toys.encoded(toys.picture(n, *size), "JPEG") for n, size in enumerate(sides)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: tiles_from(data[n], *sides[n]), range(40)))
    for mine, encoded in zip(found, data, strict=True):
        assert np.array_equal(mine, tiles_of(encoded))
