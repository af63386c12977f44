"""Vision tower and connector against SigLIP and the projector of transformers 4.57.6."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaNextImageProcessor

from conf.schema import ModelConfig, ParallelConfig
from models.vision_tower import pixel_table
from tests.distributed import megatron, run_ranks
from tests.models.tiny import hf_twin, megatron_state, tiny_model
from tests.parity.layouts import build_loaded


def test_pixel_table_is_the_slow_processor_bit_for_bit() -> None:
    pixels = np.arange(3 * 32 * 32, dtype=np.int64).reshape(32, 32, 3) % 256
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 32]],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    image = Image.fromarray(pixels.astype(np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0, 1]
    found = pixel_table()[torch.from_numpy(pixels).permute(2, 0, 1)]
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
    assert len(pixel_table().unique()) == 256


def features_worker(model: ModelConfig, state: dict, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[tiles, patches, vision hidden] and the feature table."""
    with megatron(ParallelConfig()), torch.no_grad():
        built = build_loaded(model, ParallelConfig(), state)
        return built.vision_tower(tiles).transpose(0, 1), built.feature_table(tiles)


@pytest.mark.parametrize(
    ("layer", "patch", "bias"), [(-1, 8, True), (-2, 8, False), (-4, 8, True), (2, 10, True)]
)
def test_hidden_states_of_every_feature_layer(layer: int, patch: int, bias: bool) -> None:
    """Patch 10 does not divide the tile of 32, as SigLIP's 14 does not divide 384."""
    model = tiny_model()
    model.vision = replace(model.vision, feature_layer=layer, patch_size=patch)
    model.connector.bias = bias
    twin = hf_twin(model)
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    ((hidden, table),) = run_ranks(1, features_worker, model, megatron_state(twin, model), tiles)
    with torch.no_grad():
        states = twin.model.vision_tower(
            pixel_table()[tiles.long()], output_hidden_states=True
        ).hidden_states
        expected = twin.model.multi_modal_projector(states[layer])
    assert torch.allclose(hidden, states[layer], atol=1e-5)
    assert table.shape == (3 * model.vision.grid**2 + 1, 64)
    assert torch.allclose(table[:-1], expected.flatten(0, 1), atol=1e-5)
    assert torch.equal(table[-1], twin.model.image_newline.detach())


def freeze_worker(trainable: set[str]) -> dict[str, object]:
    """What trains and what keeps a graph after `freeze(trainable)`."""
    with megatron(ParallelConfig()):
        model = tiny_model()
        built = build_loaded(model, ParallelConfig(), megatron_state(hf_twin(model), model))
        built.freeze(trainable)
        tiles = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        table = built.feature_table(tiles)
        seen: list[bool] = []
        built.vision_tower.register_forward_hook(
            lambda module, args, output: seen.append(output.requires_grad)
        )
        built.feature_table(tiles)
        return {
            "modules": {n.split(".")[0] for n, p in built.named_parameters() if p.requires_grad},
            "never": [
                n
                for n, p in built.named_parameters()
                if p.requires_grad and ("unused_layers" in n or "post_layernorm" in n)
            ],
            "vision graph": seen[0],
            "table graph": table.requires_grad,
        }


@pytest.mark.parametrize(
    ("trainable", "modules", "vision_graph", "table_graph"),
    [
        ({"connector"}, {"connector", "image_newline"}, False, True),
        ({"vision"}, {"vision_tower"}, True, True),
        ({"language"}, {"language_model"}, False, False),
        (
            {"vision", "connector", "language"},
            {"vision_tower", "connector", "image_newline", "language_model"},
            True,
            True,
        ),
    ],
)
def test_freezing(
    trainable: set[str], modules: set[str], vision_graph: bool, table_graph: bool
) -> None:
    (found,) = run_ranks(1, freeze_worker, trainable)
    assert found == {
        "modules": modules,
        "never": [],
        "vision graph": vision_graph,
        "table graph": table_graph,
    }


def unknown_worker() -> str:
    with megatron(ParallelConfig()):
        model = tiny_model()
        built = build_loaded(model, ParallelConfig(), megatron_state(hf_twin(model), model))
        with pytest.raises(ValueError) as raised:
            built.freeze({"newline"})
        return str(raised.value)


def test_unknown_module_is_refused() -> None:
    assert run_ranks(1, unknown_worker) == [
        "cannot train newline; known: vision, connector, language"
    ]


def order_worker() -> tuple[list[str], list[str]]:
    with megatron(ParallelConfig()):
        model = tiny_model()
        built = build_loaded(model, ParallelConfig(), megatron_state(hf_twin(model), model))
        before = [name for name, _ in built.named_parameters()]
        built.sharded_state_dict()
        return before, [name for name, _ in built.named_parameters()]


def test_a_save_leaves_the_order_of_the_parameters() -> None:
    ((before, after),) = run_ranks(1, order_worker)
    assert before == after
