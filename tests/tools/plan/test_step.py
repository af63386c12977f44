"""The time of a step adds up, and goes the way it must when something changes."""

import dataclasses
from typing import Any

import pytest

from conf.compose import compose
from conf.schema import Config
from models.flops import forward_flops
from tools.plan import layers
from tools.plan.communication import Group, exposed, ring_seconds
from tools.plan.efficiency import product_seconds, product_share
from tools.plan.job import Job, job_of
from tools.plan.published_rows import DGX_H100
from tools.plan.step import Step, step, step_flops
from tools.plan.workload import Row, row_of


def config_of(*overrides: str) -> Config:
    start = ["model=amalia_vl_9b", "data=amalia", "cluster=mn5", "stage=stage2"]
    layout = ["parallel=single", "parallel.world_size=64", "precision=bf16"]
    return compose([*start, *layout, "parallel.distributed_optimizer=true", *overrides])


def job(*overrides: str) -> Job:
    config = config_of(*overrides)
    return job_of(config, row_of(config))


def seconds(*overrides: str) -> Step:
    return step(job(*overrides))


TP4 = ("parallel.tensor=4", "parallel.sequence_parallel=true")


def test_the_parts_are_the_whole() -> None:
    found = seconds(*TP4, "parallel.pipeline=2")
    parts = [found.recompute, found.bubble, found.pipeline, found.gradients, found.optimizer]
    assert found.seconds == pytest.approx(found.compute.total + sum(parts) + found.other)
    assert all(part >= 0 for part in parts)


def test_products_do_the_floating_point_operations_of_the_model() -> None:
    """The shapes that are timed, against models/flops.py, which torch's counter has checked."""
    one = job()
    text = one.model.text
    shapes = [*layers.attention_shapes(one), *layers.mlp_shapes(one)]
    ours = text.layers * sum(2 * m * n * k for m, n, k in shapes)
    tokens = round(one.row.tokens)
    flops = forward_flops(one.model, [tokens], 0, 0)
    assert ours == pytest.approx(flops.language - flops.language_attention)


def test_a_split_product_does_a_share_of_the_work() -> None:
    whole, split = layers.mlp_shapes(job()), layers.mlp_shapes(job(*TP4))
    assert sum(m * n * k for m, n, k in whole) == 4 * sum(m * n * k for m, n, k in split)


def test_flops_of_a_step_count_real_tokens_only() -> None:
    one = job()
    half = dataclasses.replace(one.row, real=one.row.real / 2, targets=one.row.targets / 2)
    less = dataclasses.replace(one, row=half)
    assert step_flops(less).language == pytest.approx(step_flops(one).language / 2, rel=1e-3)


def test_larger_products_are_more_efficient_and_partial_waves_are_not() -> None:
    gpu = DGX_H100
    assert product_share(gpu, 8192, 8192, 8192) > product_share(gpu, 512, 512, 512)
    full = product_share(gpu, 128 * 132, 256, 4096)  # a tile for each multiprocessor
    assert product_share(gpu, 128 * 133, 256, 4096) < full
    fast = product_seconds(gpu, 8192, 8192, 8192, fp8=True)
    assert fast < product_seconds(gpu, 8192, 8192, 8192) < 2 * fast


def test_one_forward_one_backward_waits_as_the_formula_says() -> None:
    even = ("parallel.pipeline=2", "parallel.world_size=2", "stage.global_batch_size=8")
    found = step(_without_ends(job(*even)))
    # (p - 1) / m of the work with equal stages: Narayanan et al. 2021, section 2.2
    work = found.compute.total + found.recompute
    assert found.bubble == pytest.approx(work / 8, rel=0.02)
    chunked = job(*even, "parallel.virtual_pipeline=3", "parallel.pipeline_layers=null")
    assert step(_without_ends(chunked)).bubble == pytest.approx(work / 24, rel=0.02)


def _without_ends(one: Job) -> Job:
    """Neither tower nor a vocabulary to speak of, so that stages are alike."""
    text = dataclasses.replace(one.model.text, vocab_size=64)
    model = dataclasses.replace(one.model, text=text)
    return dataclasses.replace(one, model=model, has_vision=False)


def test_recomputation_costs_a_forward_pass() -> None:
    none, full = seconds(*TP4), seconds(*TP4, "parallel.recompute=full")
    half = seconds(*TP4, "parallel.recompute=full", "parallel.recompute_layers=21")
    assert none.recompute == 0
    assert 0.2 * none.compute.total < full.recompute < 0.4 * none.compute.total
    assert 0.4 * full.recompute < half.recompute < 0.6 * full.recompute


def test_gradients_hide_behind_the_backward_pass() -> None:
    late = seconds(*TP4)
    overlap = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    hidden = seconds(*TP4, *overlap)
    assert hidden.gradients < 0.5 * late.gradients
    assert exposed(1.0, 0.0) == 1.0 and exposed(1.0, 10.0) < 0.2


def test_collectives_inside_a_node_are_faster_and_one_rank_is_silent() -> None:
    gpu = DGX_H100
    inside, across = Group(8, 8), Group(8, 1)
    assert ring_seconds(gpu, Group(1, 1), 1e9) == 0
    assert ring_seconds(gpu, inside, 1e9) < ring_seconds(gpu, across, 1e9)
    # 7/8 of a GB at 77 % of 450 GB/s, and a latency
    assert ring_seconds(gpu, inside, 1e9) == pytest.approx(7 / 8 / (0.77 * 450) + 12e-6)


def test_frozen_decoder_has_no_weight_gradients() -> None:
    trained = step(job(*TP4))
    frozen = step(job(*TP4, "stage.lr.language=0", "stage.lr.vision=0"))
    assert frozen.compute.products < 0.75 * trained.compute.products
    assert frozen.gradients < 0.1 * trained.gradients


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 32768.0},
        {"document": 16000.0},
        {"tiles": 60.0},
        {"imbalance": 1.5},
    ],
)
def test_more_of_anything_takes_longer(change: dict[str, Any]) -> None:
    one = job(*TP4)
    more = dataclasses.replace(one, row=dataclasses.replace(one.row, **change))
    assert step(more).seconds > step(one).seconds


def test_rows_laid_end_to_end() -> None:
    row = Row(100, 90, 30, 10, tiles=4, most_tiles=7, samples=3)
    two = row.times(2)
    assert (two.tokens, two.real, two.document, two.tiles) == (200, 180, 30, 8)
    assert two.most_tiles == 11 and two.pairs == 2 * row.pairs
