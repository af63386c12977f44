"""What the whole network promises beyond parity: see tests/parity for that."""

import torch
from torch import Tensor

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models.build import build_model
from models.hf_state import table
from tests.distributed import megatron, run_ranks
from tests.models.tiny import documents, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import NOT_INPUTS, build_loaded


def losses_worker(model: ModelConfig, state: dict, batch: dict, bounds: list[int]) -> list[Tensor]:
    """Per-token losses with each of several values of `max_seqlen`."""
    with megatron(ParallelConfig()), torch.no_grad():
        built = build_loaded(model, ParallelConfig(), state)
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        return [built(**(inputs | {"max_seqlen": bound})) for bound in bounds]


def test_max_seqlen_is_a_bound_only() -> None:
    """Megatron's packed RoPE counts through documents when its table is as long as the row."""
    model = tiny_model()
    state = megatron_state(hf_twin(model), model)
    batch = micro_batch(model, [documents(model)[:4]], 512)
    longest = batch["max_seqlen"]
    assert longest < 512
    (losses,) = run_ranks(1, losses_worker, model, state, batch, [longest, 500, 512, 600])
    assert losses[0].shape == (512,) and losses[0].dtype == torch.float32
    assert all(torch.equal(losses[0], other) for other in losses[1:])


def stages_worker(model: ModelConfig) -> tuple[list[str], dict[str, tuple]]:
    with megatron(ParallelConfig(2, pipeline=2, pipeline_layers=[1, 3]), seed=7):
        from megatron.core import parallel_state

        built = build_model(
            model,
            ParallelConfig(2, pipeline=2, pipeline_layers=[1, 3]),
            PrecisionConfig(params="bf16"),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        kinds = {str(p.dtype) for p in built.parameters()}
        assert kinds == {"torch.bfloat16"}, kinds
        children = [name for name, _ in built.named_children()]
        return children, {n: tuple(p.shape) for n, p in built.named_parameters()}


def test_image_parts_are_on_the_first_stage_only() -> None:
    model = tiny_model()
    (first, first_names), (last, last_names) = run_ranks(2, stages_worker, model)
    assert first == ["vision_tower", "connector", "language_model"]
    assert last == ["language_model"]
    assert "image_newline" in first_names and "image_newline" not in last_names
    assert "language_model.embedding.word_embeddings.weight" in first_names
    assert "language_model.output_layer.weight" in last_names
    layers = {n.split(".")[3] for n in last_names if n.startswith("language_model.decoder.layers")}
    assert layers == {"0", "1", "2"}


def initial_worker(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Tensor]:
    from tests.models.shards import gather_shards

    with megatron(parallel, seed=7):
        built = build_model(model, parallel, PrecisionConfig(), pre_process=True, post_process=True)
        return gather_shards(built, "data")


def test_names_are_the_table_and_initial_weights_do_not_depend_on_tensor_parallelism() -> None:
    model = tiny_model()
    (one,) = run_ranks(1, initial_worker, model, ParallelConfig())
    two, again = run_ranks(2, initial_worker, model, ParallelConfig(2, tensor=2))
    assert {n: tuple(t.shape) for n, t in one.items()} == {
        entry.megatron: entry.shape for entry in table(model)
    }
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]) and torch.equal(tensor, again[name]), name


def bf16_worker(model: ModelConfig, state: dict, batch: dict) -> tuple[Tensor, Tensor, int]:
    """Per-token losses in float32 and in BF16, and parameters without a finite gradient."""
    from tests.models.shards import load_shards

    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    with megatron(ParallelConfig()):
        exact = build_loaded(model, ParallelConfig(), state)(**inputs).detach()
        rounded = build_model(
            model,
            ParallelConfig(recompute="selective"),
            PrecisionConfig(params="bf16"),
            pre_process=True,
            post_process=True,
        )
        load_shards(rounded, state)
        losses = rounded(**inputs)
        losses.mean().backward()
        bad = sum(
            p.requires_grad and (p.grad is None or not bool(p.grad.isfinite().all()))
            for p in rounded.parameters()
        )
        return exact, losses.detach(), bad


def test_bf16_losses_are_float32_and_near() -> None:
    model = tiny_model()
    state = megatron_state(hf_twin(model), model)
    batch = micro_batch(model, [documents(model)[:4]], 512)
    ((exact, rounded, bad),) = run_ranks(1, bf16_worker, model, state, batch)
    assert rounded.dtype == torch.float32 and bad == 0
    mask = batch["loss_mask_T"].bool()
    # BF16 keeps eight bits: a percent or two of the loss over this depth
    assert float((exact - rounded)[mask].abs().mean()) < 0.03 * float(exact[mask].mean())
    assert not torch.equal(exact, rounded)
