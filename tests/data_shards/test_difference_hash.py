"""Photographs stay near themselves and far from others; pages and flat pictures are told apart."""

import functools
import importlib.util
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from conf.schema.data import DuplicatesConfig, ImageLimits
from data_shards.duplicates import MIN_DETAIL, find_duplicates
from data_shards.fingerprint_arrays import NamedFingerprints
from data_shards.fingerprints import SCHEMA, fingerprint
from data_shards.image_store import StoredImage, store
from data_shards.sample import Sample, parse_sample
from tests.data_shards import toys

LIMITS = ImageLimits()
NEAR = 6
PHOTOS = {"sklearn": ("china.jpg", "flower.jpg"), "matplotlib": ("grace_hopper.jpg",)}
FOLDERS = {"sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


@functools.cache
def photographs() -> list[Image.Image]:
    """Photographs that come with libraries, whole and (the wide ones) their halves."""
    found = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package}, whose photographs these are, is not installed")
        for name in names:
            whole = Image.open(Path(spec.origin).parent / FOLDERS[package] / name).convert("RGB")
            found.append(whole)
            if whole.width > whole.height:
                middle = whole.width // 2
                found.append(whole.crop((0, 0, middle, whole.height)))
                found.append(whole.crop((middle, 0, *whole.size)))
    return found


def stored(image: Image.Image, form: str = "PNG", **options: object) -> StoredImage:
    if form == "PNG":
        options["compress_level"] = 1
    return store(toys.encoded(image, form, **options), LIMITS)


def distance(a: StoredImage, b: StoredImage) -> int:
    return (int.from_bytes(a.hash) ^ int.from_bytes(b.hash)).bit_count()


def ones(image: StoredImage) -> int:
    return int.from_bytes(image.hash).bit_count()


def scaled(image: Image.Image, factor: float) -> Image.Image:
    size = int(image.width * factor), int(image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def test_copies_of_photographs_are_near_and_others_far() -> None:
    photos = photographs()
    hashes = [stored(photo) for photo in photos]
    for photo, one in zip(photos, hashes, strict=True):
        copies = [stored(photo, "JPEG", quality=quality) for quality in (30, 80)]
        copies += [stored(scaled(photo, factor)) for factor in (0.5, 1.3)]
        copies += [
            stored(scaled(photo, 0.5), "JPEG", quality=75),
            stored(photo.convert("L")),
        ]
        assert max(distance(one, copy) for copy in copies) <= NEAR
        assert MIN_DETAIL < ones(one) < 256 - MIN_DETAIL
    assert min(distance(a, b) for a, b in combinations(hashes, 2)) > 60


def test_the_hash_is_of_the_upright_picture() -> None:
    photo = photographs()[0]
    for value, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[0x0112] = value
        lying = stored(photo.transpose(turn), "JPEG", quality=90, exif=exif)
        assert (lying.width, lying.height) == photo.size
        assert distance(lying, stored(photo)) <= NEAR


def page(seed: int, lines: int, words: int = 11) -> Image.Image:
    """Black text on white, A4 at about 100 dots an inch."""
    generator = np.random.default_rng(seed)
    image = Image.new("L", (800, 1100), 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(20)
    alphabet = list("aaaabcdeeeefghiiijlmnoooopqrssstuvxz")
    for line in range(lines):
        text = " ".join(
            "".join(generator.choice(alphabet, generator.integers(1, 9))) for _ in range(words)
        )
        draw.text((60, 60 + 32 * line), text, 0, font)
    return image


def plain(seed: int) -> Image.Image:
    return Image.new("RGB", (300, 200), (200, 150, 20 * seed))


def ramp(seed: int) -> Image.Image:
    levels = np.linspace(250 - seed, 10 + seed, 400)
    return Image.fromarray(np.tile(levels, (300, 1)).astype(np.uint8))


def dotted(seed: int) -> Image.Image:
    image = Image.new("L", (400, 300), 255)
    x, y = np.random.default_rng(seed).integers(20, 280, 2).tolist()
    ImageDraw.Draw(image).ellipse((x, y, x + 3, y + 3), fill=0)
    return image


FLAT: dict[str, Callable[[int], Image.Image]] = {
    "plain": plain,
    "ramp": ramp,
    "dotted": dotted,
    "title": lambda seed: page(seed, 1, 4),
}


def sample(number: int, image: StoredImage, text: str) -> Sample:
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}]
    return parse_sample(
        {"messages": turns},
        [image.data],
        key=str(number),
        source="s",
        licence="CC0",
        origin=f"f:{number}",
        preference=False,
    )


def prints(name: str, images: list[StoredImage], text: str = "n.º {}") -> NamedFingerprints:
    rows = [
        {"number": n, **fingerprint(sample(n, image, text.format(n)), [image])}
        for n, image in enumerate(images)
    ]
    return NamedFingerprints(name, pa.Table.from_pylist(rows, schema=SCHEMA))


@pytest.mark.parametrize("kind", FLAT)
def test_flat_pictures_are_not_thrown_together(kind: str) -> None:
    """Their hashes are near one another, and say nothing: only the very same one is left out."""
    images = [stored(FLAT[kind](seed)) for seed in range(6)]
    near = sum(distance(a, b) <= NEAR for a, b in combinations(images, 2))
    assert near >= 5, "not the pictures that this test is about"
    sources = [prints("s", [*images, stored(FLAT[kind](2), "BMP")])]
    found = find_duplicates(sources, [prints("e", [images[4]])], DuplicatesConfig(), {"s": True})
    assert found == {
        "s": {
            4: "an image alike to evaluation set: row 0 of e",
            6: "images alike to those of row 2 of s",
        }
    }


def test_pages_of_text_are_told_apart() -> None:
    images = [stored(page(seed, 28)) for seed in range(6)]
    assert min(distance(a, b) for a, b in combinations(images, 2)) > 3 * NEAR
    assert find_duplicates([prints("s", images)], [], DuplicatesConfig(), {"s": True}) == {"s": {}}


def test_a_copy_is_found_under_other_words_only_where_asked() -> None:
    photos = photographs()[:2]
    images = [stored(photos[0]), stored(photos[1]), stored(photos[0], "JPEG", quality=70)]
    rules = DuplicatesConfig()
    for unique, text, expected in (
        (False, "n.º {}", {}),
        (True, "n.º {}", {2: "images alike to those of row 0 of s"}),
        (
            False,
            "Uma fotografia.",
            {2: "a duplicate: the same text and images alike to row 0 of s"},
        ),
    ):
        found = find_duplicates([prints("s", images, text)], [], rules, {"s": unique})
        assert found == {"s": expected}
    tests = [prints("exame", [stored(scaled(photos[1], 0.6), "JPEG", quality=80)])]
    found = find_duplicates([prints("s", images)], tests, rules, {})
    assert found == {"s": {1: "an image alike to evaluation set: row 0 of exame"}}
