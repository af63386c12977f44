"""The demo's pictures: splits by scan, determinism, tiles and labels by the training geometry."""

import numpy as np
import pytest
from PIL import Image

from models.anyres import AnyresGeometry, pinpoints_up_to
from tools.demo.canvases import (
    BACKGROUNDS,
    DEV_SCANS,
    HELD_OUT_SCANS,
    draw_scene,
    load_scans,
    render,
)
from tools.demo.tiles import NO_DIGIT, PADDING, cut_tiles, patch_labels

GEOMETRY = AnyresGeometry(tile=32, patch=8, pinpoints=pinpoints_up_to(32, 4))


def scenes(n, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, split) for _ in range(n)]


def test_no_scan_is_in_two_splits():
    scans = load_scans()
    numbers = [set(split.numbers.tolist()) for split in scans.values()]
    assert [len(split) for split in numbers] == [1797 - DEV_SCANS - HELD_OUT_SCANS, 180, 280]
    assert len(set.union(*numbers)) == 1797
    # Nor is a scan's twin: no two splits share a picture, pixel for pixel.
    pixels = [{scan.tobytes() for scan in split.pixels} for split in scans.values()]
    assert not pixels[0] & pixels[1] and not pixels[0] & pixels[2] and not pixels[1] & pixels[2]


def test_every_split_has_every_digit():
    for split in load_scans().values():
        assert set(split.labels.tolist()) == set(range(10))


def test_same_seed_same_pixels_and_other_seed_others():
    first, second, other = scenes(20), scenes(20), scenes(20, seed=1)
    assert first == second
    assert [render(a).tobytes() for a in first] == [render(b).tobytes() for b in second]
    assert first != other


def test_scene_shows_the_scans_it_names():
    scans = load_scans()["dev"]
    for scene in scenes(50, "dev"):
        assert scene.values == tuple(int(scans.labels[digit.scan]) for digit in scene.digits)
        places = [(digit.row, digit.column) for digit in scene.digits]
        assert places == sorted(set(places))
        for digit in scene.digits:
            assert 0 <= digit.left <= digit.left + digit.side <= scene.width + 1
            assert 0 <= digit.top <= digit.top + digit.side <= scene.height + 1


def test_pictures_have_many_shapes_and_tilings():
    drawn = scenes(200)
    assert len({(scene.height, scene.width) for scene in drawn}) > 150
    assert {GEOMETRY.tile_grid(scene.height, scene.width) for scene in drawn} >= {
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2),
    }  # fmt: skip


def test_pixels_show_background_and_ink():
    for scene in scenes(30):
        picture = np.asarray(render(scene)).astype(int)
        assert picture.shape == (scene.height, scene.width, 3)
        expected = np.array(BACKGROUNDS[scene.colour])
        assert np.abs(np.median(picture, (0, 1)) - expected).max() <= 60
        for digit in scene.digits:
            top, left, side = round(digit.top), round(digit.left), round(digit.side)
            assert picture[top : top + side, left : left + side].min(-1).max() > 150


def test_too_many_digits_are_refused():
    with pytest.raises(ValueError, match="5 digits do not fit 2x2"):
        draw_scene(np.random.default_rng(0), "train", (2, 2), 5)


def test_tiles_are_those_of_transformers():
    from transformers import LlavaNextImageProcessor

    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[list(pair) for pair in GEOMETRY.pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=Image.Resampling.BICUBIC,
    )
    for scene in scenes(25):
        picture = render(scene)
        tiles = cut_tiles(picture, GEOMETRY)
        assert len(tiles) == GEOMETRY.n_tiles(scene.height, scene.width)
        theirs = processor(picture, return_tensors="np").pixel_values[0][: len(tiles)]
        ours = tiles.transpose(0, 3, 1, 2) / 127.5 - 1
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_labels_lie_where_the_ink_is():
    """Patches with bright ink are labelled with a digit, dark ones are not."""
    right, inked = 0, 0
    for scene in scenes(40):
        labels = patch_labels(scene, GEOMETRY).reshape(-1, 4, 4)
        tiles = cut_tiles(render(scene), GEOMETRY)
        assert len(labels) == len(tiles)
        assert set(labels[labels < NO_DIGIT].tolist()) <= set(scene.values)
        assert set(labels[1:][labels[1:] < NO_DIGIT].tolist()) == set(scene.values)
        # [tile, patch row, y, patch column, x] -> bright pixels of each patch
        ink = (tiles.min(-1) > 200).reshape(-1, 4, 8, 4, 8).sum((2, 4)) >= 6
        right += int((labels[ink] < NO_DIGIT).sum())
        inked += int(ink.sum())
        black = tiles.max(-1).reshape(-1, 4, 8, 4, 8).max((2, 4)) == 0
        assert (labels[black] == PADDING).all()
    assert right > 0.97 * inked > 300
