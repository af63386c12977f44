"""What is computed once, what is not computed, and what is not kept."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import ModelConfig, ParallelConfig
from data_shards.chat import Encoded
from data_shards.collate import LoadedSample, collate
from models.anyres import AnyresGeometry
from models.context_parallel import full_order
from pipeline.batch import DeviceBatch
from tests.distributed import megatron, run_ranks
from tests.models.tiny import documents, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import build_loaded

ONE = ParallelConfig()


@pytest.fixture(scope="module")
def weights() -> tuple[ModelConfig, dict[str, Tensor]]:
    model = tiny_model()
    return model, megatron_state(hf_twin(model), model)


def tiles_worker(
    model: ModelConfig, parallel: ParallelConfig, state: dict, batches: Sequence[dict]
) -> list[tuple[list[int], Tensor]]:
    """For each batch: the number of tiles of each call of the vision tower, and the losses."""
    with megatron(parallel), torch.no_grad():
        built = build_loaded(model, parallel, state)
        calls: list[int] = []
        built.vision_tower.encoder.register_forward_pre_hook(
            lambda module, given: calls.append(given[0].shape[1])
        )
        found = []
        for batch in batches:
            calls.clear()
            losses = built(**batch)
            found.append((list(calls), losses))
        return found


def pair_batch(model: ModelConfig, both: bool) -> dict:
    """A preference pair of two pictures; or its chosen answer only."""
    geometry, sizes = AnyresGeometry.from_model(model), ((33, 70), (61, 64))
    draw = np.random.default_rng(0)
    files = []
    for height, width in sizes:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    tokens = [geometry.n_tokens(*size) for size in sizes]
    prompt = [5, *[model.image_token_id] * tokens[0], 7, *[model.image_token_id] * tokens[1], 8]
    answers = [
        Encoded(
            ids=np.array([*prompt, *answer], np.int64),
            targets=np.arange(len(prompt) + len(answer)) >= len(prompt),
            image_starts=np.array([1, 2 + tokens[0]]),
        )
        for answer in ([11, 12, 13], [14, 15])
    ]
    sample = LoadedSample((0, 0), tuple(answers if both else answers[:1]), sizes, tuple(files))
    packed = collate(
        [[sample]],
        geometry,
        sequence_length=384,
        document_multiple=8,
        pad_id=0,
        need_images=True,
    )
    return DeviceBatch.from_packed(packed, torch.device("cpu")).model_inputs()


def test_both_answers_of_a_pair_share_the_features(weights: tuple) -> None:
    """The tower sees the pair's tiles once, and the chosen answer as if it were alone."""
    model, state = weights
    pair, alone = pair_batch(model, both=True), pair_batch(model, both=False)
    geometry = AnyresGeometry.from_model(model)
    tiles = geometry.n_tiles(33, 70) + geometry.n_tiles(61, 64)
    assert 2 * len(alone["image_positions_P"]) == len(pair["image_positions_P"])
    ((both, one),) = run_ranks(1, tiles_worker, model, ONE, state, [pair, alone])
    assert both[0] == one[0] == [tiles]
    length = int(alone["cu_seqlens"][1])
    torch.testing.assert_close(both[1][:length], one[1][:length], atol=1e-5, rtol=0)
    assert float(both[1][length:].abs().max()) > 1, "the rejected answer has losses too"


@pytest.mark.parametrize("ranks", [2, 4])
def test_context_ranks_share_the_tiles(weights: tuple, ranks: int) -> None:
    """As many tiles on every rank, at least one, together all; the losses stay."""
    model, state = weights
    layout = ParallelConfig(ranks, context=ranks)
    pair = pair_batch(model, both=True)
    text = micro_batch(model, [[]], 64)
    tiles = len(pair["tiles_NCHW"])
    assert tiles % 4, "an uneven number"
    (one,) = run_ranks(1, tiles_worker, model, ONE, state, [pair, text])
    answers = run_ranks(ranks, tiles_worker, model, layout, state, [pair, text])
    for (calls, _), (text_calls, _) in answers:
        assert calls == [-(-tiles // ranks)] and text_calls == [1]
    shared = torch.cat([answer[0][1] for answer in answers])
    shared = shared[full_order(pair["cu_seqlens"], ranks)]
    torch.testing.assert_close(shared, one[0][1], atol=1e-5, rtol=0)


def saved_worker(
    model: ModelConfig, state: dict, batch: dict, trainable: Sequence[str]
) -> dict[str, int]:
    """Bytes that autograd keeps, parameters apart: while each module runs."""
    with megatron(ONE):
        built = build_loaded(model, ONE, state)
        built.freeze(trainable)
        own = {p.untyped_storage().data_ptr() for p in built.parameters()}
        running, kept = ["elsewhere"], {"elsewhere": 0}
        for name in ("vision_tower", "connector", "language_model"):
            module, kept[name] = getattr(built, name), 0
            module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            module.register_forward_hook(lambda *_: running.pop() and None)

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[running[-1]] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            built(**batch).sum().backward()
        return kept


def test_a_frozen_tower_keeps_nothing(weights: tuple) -> None:
    model, state = weights
    batch = micro_batch(model, [documents(model)[:2]], 256)
    runs = {
        names: run_ranks(1, saved_worker, model, state, batch, names)[0]
        for names in (("connector",), ("language",), ("vision", "connector", "language"))
    }
    stage_one, language_only, stage_two = runs.values()
    assert stage_one["vision_tower"] == 0 < stage_one["connector"]
    assert language_only["vision_tower"] == language_only["connector"] == 0
    assert stage_two["vision_tower"] > stage_two["connector"] > 0
    # a frozen matrix product needs its weight for the way back, not its input
    assert 0 < stage_one["language_model"] < stage_two["language_model"]


class Products(TorchDispatchMode):
    """Remembers the shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append(tuple(result.shape[-2:]))
        return result


def products_worker(
    model: ModelConfig, parallel: ParallelConfig, state: dict, batch: dict, trainable: Sequence[str]
) -> tuple[int, int, set[str]]:
    """In the backward pass: products as large as a decoder weight, all, and who got a gradient."""
    with megatron(parallel):
        built = build_loaded(model, parallel, state)
        built.freeze(trainable)
        matrices = {tuple(p.shape) for p in built.language_model.parameters() if p.dim() == 2}
        layer, seen = built.language_model.output_layer, Products()
        layer.register_forward_pre_hook(lambda *_: seen.__enter__() and None)
        layer.register_forward_hook(lambda *_: seen.__exit__(None, None, None))
        losses = built(**batch)
        rows = [height for height, width in seen.shapes if width == model.text.vocab_size]
        assert sum(rows) == int(batch["loss_mask_T"].sum())
        assert parallel.loss_chunk == 0 or max(rows) == parallel.loss_chunk < sum(rows)
        with Products() as seen:
            losses.sum().backward()
        like_weights = sum(s in matrices or s[::-1] in matrices for s in seen.shapes)
        got = {name for name, p in built.named_parameters() if p.grad is not None}
        return like_weights, len(seen.shapes), got


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_frozen_decoder_only_passes_gradients_on(weights: tuple, chunk: int) -> None:
    model, state = weights
    layout = ParallelConfig(loss_chunk=chunk)
    batch = micro_batch(model, [documents(model)[:2]], 256)
    ((none, some, got),) = run_ranks(1, products_worker, model, layout, state, batch, ["connector"])
    assert none == 0 < some
    assert {name.split(".")[0] for name in got} == {"connector", "image_newline"}
    ((all_of_them, more, got),) = run_ranks(
        1, products_worker, model, layout, state, batch, ["connector", "language"]
    )
    matrices = 4 * model.text.layers  # and one of the output layer for each chunk
    assert all_of_them > matrices and more > some
    assert {name.split(".")[0] for name in got} == {"connector", "image_newline", "language_model"}
