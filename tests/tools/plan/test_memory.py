"""Memory goes the way it must with the layout (counted bytes: test_cpu_memory.py)."""

import dataclasses

import pytest

from conf.compose import compose
from tools.plan import activations
from tools.plan.job import Job, job_of
from tools.plan.memory import GIB, fit, fits, stage_memory
from tools.plan.workload import row_of


def job(*overrides: str) -> Job:
    start = ["model=amalia_vl_9b", "data=amalia", "cluster=mn5", "stage=stage2", "parallel=single"]
    layout = ["parallel.world_size=64", "parallel.distributed_optimizer=true", "precision=bf16"]
    config = compose([*start, *layout, *overrides])
    return job_of(config, row_of(config))


TP4 = ("parallel.tensor=4", "parallel.sequence_parallel=true")


def test_a_layer_keeps_what_the_literature_says() -> None:
    """Korthikanti et al. 2022, table 2: 34 * s * b * h / t bytes a layer with selective
    recomputation, tensor and sequence parallelism. That is GPT's: two MLP matrices of 4h, GELU
    (its input and output kept), full attention heads, dropout masks (2 of the 34)."""
    one = job(*TP4)
    text = dataclasses.replace(one.model.text, kv_heads=32, intermediate_size=4 * 4096)
    gpt = dataclasses.replace(
        one,
        model=dataclasses.replace(one.model, text=text),
        software=dataclasses.replace(one.software, gated=False),
    )
    per_token = activations.decoder_layer_token(gpt, fp8=False)
    assert per_token == pytest.approx(32 * 4096 / 4, rel=0.01)


def test_the_optimizer_is_shared_by_all_replicas() -> None:
    one = stage_memory(job(*TP4), 0)
    assert one.weights == pytest.approx(2 * 9.6e9 / 4, rel=0.01)
    assert one.gradients == pytest.approx(4 * 9.6e9 / 4, rel=0.01)
    assert one.optimizer == pytest.approx(12 * 9.6e9 / 64, rel=0.01)
    alone = stage_memory(job(*TP4, "parallel.distributed_optimizer=false"), 0)
    assert alone.optimizer == pytest.approx(16 * one.optimizer)


def test_what_saves_memory_saves_it() -> None:
    one = stage_memory(job(*TP4), 0)
    states = stage_memory(job(*TP4, "parallel.optimizer_states=bf16"), 0)
    assert states.optimizer == one.optimizer / 2
    offloaded = stage_memory(job(*TP4, "parallel.optimizer_offload=0.75"), 0)
    assert offloaded.optimizer == one.optimizer / 4
    chunked = stage_memory(job(*TP4, "parallel.loss_chunk=1024"), 0)
    assert chunked.logits < one.logits / 4
    recomputed = stage_memory(job(*TP4, "parallel.recompute=full"), 0)
    assert recomputed.activations < one.activations / 10
    assert recomputed.vision < one.vision
    few = stage_memory(job(*TP4, "parallel.recompute=full", "parallel.recompute_layers=10"), 0)
    assert recomputed.activations < few.activations < one.activations
    fp8 = stage_memory(job(*TP4, "precision=fp8"), 0)
    assert fp8.weights > one.weights and fp8.activations < one.activations


def test_context_parallel_ranks_share_tokens_and_tiles() -> None:
    one = job(*TP4)
    two = job(*TP4, "parallel.context=2")
    assert stage_memory(two, 0).activations == stage_memory(one, 0).activations / 2
    assert two.tiles_here == -(-round(one.row.tiles) // 2)
    assert stage_memory(two, 0).vision < stage_memory(one, 0).vision


def test_early_stages_hold_more_micro_batches() -> None:
    four = job(*TP4, "parallel.pipeline=4", "parallel.pipeline_layers=[10,11,11,10]")
    held = [activations.layers_in_flight(four, stage) for stage in range(4)]
    assert held == [4 * 10, 3 * 11, 2 * 11, 1 * 10]
    # Megatron's get_pp_rank_microbatches: 2 (p - s - 1) + (v - 1) p warm-up steps, and the next.
    interleaved = job(*TP4, "parallel.pipeline=2", "parallel.virtual_pipeline=3")
    assert interleaved.layers == (7,) * 6
    assert activations.layers_in_flight(interleaved, 0) == 7 * (2 + 4 + 1)
    assert activations.layers_in_flight(interleaved, 1) == 7 * (0 + 4 + 1)


def test_frozen_modules_have_neither_gradients_nor_states() -> None:
    stage1 = stage_memory(job(*TP4, "stage.lr.language=0", "stage.lr.vision=0"), 0)
    assert stage1.gradients + stage1.optimizer < 0.05 * GIB
    assert stage1.activations < stage_memory(job(*TP4), 0).activations


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_fullest_stage_decides(tensor: int) -> None:
    one = job(
        f"parallel.tensor={tensor}",
        f"parallel.sequence_parallel={str(tensor > 1).lower()}",
        "parallel.pipeline=2",
    )
    found = fit(one)
    sizes = [stage_memory(one, stage).total for stage in range(2)]
    assert found.memory.total == max(sizes) and found.fits == fits(one) == (tensor == 4)
