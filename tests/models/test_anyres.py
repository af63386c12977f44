"""Tiling geometry against the functions of transformers 4.57.6 themselves."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from conf.schema import ModelConfig, TextConfig, VisionConfig
from models.anyres import NEWLINE, AnyresGeometry, pinpoints_up_to

GEOMETRIES = {
    "patch16": AnyresGeometry(384, 16, pinpoints_up_to(384, 12)),
    "patch14": AnyresGeometry(384, 14, pinpoints_up_to(384, 9)),
    "tiny": AnyresGeometry(32, 8, pinpoints_up_to(32, 4)),
    "reversed": AnyresGeometry(32, 8, tuple(reversed(pinpoints_up_to(32, 6)))),
    "llava": AnyresGeometry(56, 14, ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))),
}
EXTREMES = [
    (1, 1),
    (1, 5000),
    (5000, 1),
    (2000, 37),
    (33, 2500),
    (4, 60000),
    (60000, 5),
    (384, 384),
]


def sizes(count: int, seed: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    small = [(draw.randint(1, 200), draw.randint(1, 200)) for _ in range(count // 2)]
    wide = [
        (max(1, int(10 ** draw.uniform(0, 3.7))), max(1, int(10 ** draw.uniform(0, 3.7))))
        for _ in range(count - count // 2)
    ]
    return EXTREMES + small + wide


def pins(geometry: AnyresGeometry) -> list[list[int]]:
    return [list(pair) for pair in geometry.pinpoints]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_canvas_tiles_and_resize_box(name: str) -> None:
    geometry = GEOMETRIES[name]
    expected_pins = pins(geometry)
    for height, width in sizes(3000, seed=1):
        best = select_best_resolution((height, width), expected_pins)
        assert geometry.best_resolution(height, width) == best
        assert geometry.tile_grid(height, width) == get_anyres_image_grid_shape(
            (height, width), expected_pins, geometry.tile
        )
        assert geometry.n_tiles(height, width) == image_size_to_num_patches(
            (height, width), expected_pins, geometry.tile
        )
        new_height, new_width, top, left = geometry.resize_box(height, width)
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        assert (new_height, new_width) == get_patch_output_size(image, best, "channels_last")
        # the method does not read self
        pad = LlavaNextImageProcessor._get_padding_size(None, (new_height, new_width), best)
        assert (top, left) == (pad[0][0], pad[1][0])
        assert new_height + sum(pad[0]) == best[0] and new_width + sum(pad[1]) == best[1]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_token_count_and_unpadding(name: str) -> None:
    geometry = GEOMETRIES[name]
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": geometry.tile},
        crop_size={"height": geometry.tile, "width": geometry.tile},
        image_grid_pinpoints=pins(geometry),
    )
    processor.patch_size = geometry.patch
    processor.num_additional_image_tokens = 0
    processor.vision_feature_select_strategy = "full"
    drawn = sizes(3000, seed=2)
    counted = processor._get_num_multimodal_tokens(image_sizes=drawn)["num_image_tokens"]
    for (height, width), count in zip(drawn, counted, strict=True):
        assert geometry.n_tokens(height, width) == count
        rows, columns = (side * geometry.grid for side in geometry.tile_grid(height, width))
        index = torch.arange(rows * columns).view(1, rows, columns)
        kept = unpad_image(index, (height, width))
        grid_rows, grid_columns, top, left = geometry.unpadded_grid(height, width)
        assert kept.shape[1:] == (grid_rows, grid_columns)
        assert torch.equal(kept, index[:, top : top + grid_rows, left : left + grid_columns])
        assert count <= geometry.max_tokens()


@pytest.mark.parametrize("name", ["tiny", "reversed", "llava"])
def test_feature_rows_equal_pack_image_features(name: str) -> None:
    """Run HF's own packing on features whose value is their row number."""
    geometry = GEOMETRIES[name]
    model = LlavaNextModel.__new__(LlavaNextModel)
    torch.nn.Module.__init__(model)
    model.config = LlavaNextConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": geometry.tile,
            "patch_size": geometry.patch,
        },
        image_grid_pinpoints=pins(geometry),
    )
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    for height, width in sizes(400, seed=3):
        tiles = geometry.n_tiles(height, width)
        rows = torch.arange(tiles * geometry.grid**2, dtype=torch.float64)
        packed, lengths = model.pack_image_features(
            [rows.view(tiles, geometry.grid**2, 1)],
            torch.tensor([[height, width]]),
            vision_feature_select_strategy="full",
            image_newline=newline,
        )
        ours = geometry.feature_rows(height, width)
        assert ours.dtype == np.int64 and ours.shape == (lengths[0].item(),)
        assert np.array_equal(ours, packed[0][:, 0].numpy().astype(np.int64))
        assert len(ours) == geometry.n_tokens(height, width)


def test_tiles_come_in_the_order_of_the_image_processor() -> None:
    """Every tile of a numbered canvas holds the pixels that `feature_rows` says it does."""
    geometry = GEOMETRIES["tiny"]
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=pins(geometry),
        do_rescale=False,
        do_normalize=False,
        resample=0,
    )
    for height, width in [(64, 64), (32, 96), (20, 90), (90, 31), (64, 50)]:
        pixels = np.arange(height * width, dtype=np.int64).reshape(height, width) % 251
        image = Image.fromarray(np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2))
        tiles = processor(image, return_tensors="np")["pixel_values"][0]
        assert len(tiles) == geometry.n_tiles(height, width)
        new_height, new_width, top, left = geometry.resize_box(height, width)
        canvas = np.zeros(geometry.best_resolution(height, width), dtype=np.uint8)
        resized = np.asarray(image.resize((new_width, new_height), resample=0))[..., 0]
        canvas[top : top + new_height, left : left + new_width] = resized
        rows, columns = geometry.tile_grid(height, width)
        for row in range(rows):
            for column in range(columns):
                cut = canvas[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
                assert np.array_equal(tiles[1 + row * columns + column][0], cut)


def test_pinpoints_of_the_paper_keep_below_7800_tokens() -> None:
    geometry = GEOMETRIES["patch16"]
    assert len(geometry.pinpoints) == 35
    assert geometry.pinpoints[:3] == ((384, 384), (384, 768), (384, 1152))
    assert geometry.max_tokens() == 7776
    assert geometry.n_tokens(384 * 12, 384) == 7776
    assert GEOMETRIES["patch14"].max_tokens() == 7533


def test_from_model_and_digest() -> None:
    model = ModelConfig(
        name="t",
        vision=VisionConfig(16, 32, 2, 2, image_size=32, patch_size=8),
        text=TextConfig(16, 32, 2, 2, 1, 8, 64, 128),
        image_token_id=5,
        max_tiles=4,
    )
    geometry = AnyresGeometry.from_model(model)
    assert geometry == GEOMETRIES["tiny"] and geometry.digest() == GEOMETRIES["tiny"].digest()
    model.pinpoints = [[32, 64], [64, 32]]
    other = AnyresGeometry.from_model(model)
    assert other.pinpoints == ((32, 64), (64, 32))
    assert other.digest() != geometry.digest()
    model.pinpoints.reverse()
    assert AnyresGeometry.from_model(model).digest() != other.digest()  # order matters


@pytest.mark.parametrize("arguments", [(30, 31, ((30, 30),)), (32, 8, ()), (32, 8, ((48, 32),))])
def test_impossible_geometry_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="model\\."):
        AnyresGeometry(*arguments)


def test_empty_image_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        GEOMETRIES["tiny"].n_tokens(0, 5)
