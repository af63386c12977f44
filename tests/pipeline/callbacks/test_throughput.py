"""Figures of a step, and the places where people read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compose
from conf.schema import Config
from models.flops import forward_flops, training_flops
from pipeline.callbacks.base import BatchCounts, StepEvent, Work
from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.progress import Progress
from pipeline.callbacks.tensorboard import TensorBoard
from pipeline.callbacks.throughput import Figures, Throughput, heaviest, speed
from pipeline.timers import KINDS
from tests.pipeline.callbacks.fake_trainer import FakeTrainer, event

SHARES = (Work(3000, 10**6, 900, 12), Work(1000, 3 * 10**6, 300, 0))


def stage1(*overrides: str) -> Config:
    """Only the connector trains; two replicas on an H100 node."""
    return compose(["stage=stage1", "model=amalia_vl_9b", "parallel=dp2", *overrides])


def step(**changes: Any) -> StepEvent:
    counts = BatchCounts(4000, 9, 5, 12, 0, positions=5000, replicas=SHARES)
    made = replace(event(step=7, seconds=2.0), counts=counts, waits=(0.1, 0.7, 0.2))
    return replace(made, memory=(2.0**30, 5.0 * 2**30, 0.0), **changes)


def test_figures() -> None:
    config = stage1("cluster.gpu_tflops=989")
    found = Throughput(config).figures(step())
    assert found.tokens_per_second == 2000
    assert found.images_per_second == 2.5
    assert found.effective_tokens == 0.8
    assert (found.seconds_data_max, found.data_rank) == (0.7, 1)
    assert found.peak_memory_gib == 5
    assert found.imbalance["attention"] == 1.5
    assert found.imbalance["tiles"] == 2
    assert 1 < found.imbalance["flops"] < 2
    assert found.mfu == found.tflops_per_gpu / 989


def test_flops_are_those_of_what_trains() -> None:
    """One document of 10 tokens a replica, by hand."""
    config = stage1()
    share = Work(10, 55, 4, 1)
    counts = replace(step().counts, replicas=(share, share))
    found = Throughput(config).figures(step(counts=counts))
    forward = forward_flops(config.model, [10], 4, 1)
    expected = training_flops(forward, {"connector"}).total
    assert expected < training_flops(forward, {"connector", "language"}).total
    assert found.tflops_per_gpu == pytest.approx(2 * expected / 2.0 / 2 / 1e12)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert compose(["stage=stage1"]).cluster.gpu_tflops is None
    found = Throughput(stage1()).figures(step())
    assert found.mfu is None and found.record()["mfu"] is None
    assert "MFU" not in speed(found)


def test_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(stage1())
    calls: list[StepEvent] = []
    compute = throughput._compute

    def counted(given: StepEvent) -> Figures:
        calls.append(given)
        return compute(given)

    monkeypatch.setattr(throughput, "_compute", counted)
    one, other = step(), step()
    assert throughput.figures(one) is throughput.figures(one)
    throughput.figures(other)
    assert calls == [one, other]


def test_nothing_to_do_is_even() -> None:
    assert heaviest([0, 0]) == heaviest([]) == 1
    assert heaviest([1, 3]) == 1.5


def test_a_line_says_how_fast() -> None:
    figures = Throughput(stage1("cluster.gpu_tflops=989")).figures(step())
    fast = replace(figures, tokens_per_second=12345.6, tflops_per_gpu=412.3, mfu=0.4169)
    assert speed(fast) == "12,346 tok/s  412 TFLOP/s (MFU 41.7 %)"
    slow = replace(fast, tflops_per_gpu=0.00123, mfu=None)
    assert speed(slow) == "12,346 tok/s  1.23 GFLOP/s"


def test_metrics_tensorboard_and_progress_show_them(tmp_path: Path) -> None:
    config = stage1("cluster.gpu_tflops=989")
    throughput = Throughput(config)
    trainer: Any = FakeTrainer()
    split = dict.fromkeys(KINDS, 0.25)
    callbacks = [
        MetricsFile(tmp_path / "metrics.jsonl", throughput),
        TensorBoard(tmp_path / "tensorboard", throughput),
        Progress(1, throughput),
    ]
    for callback in callbacks:
        callback.on_start(trainer)
        callback.on_step(trainer, step(split=split))
        callback.on_end(trainer)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["tokens_per_second"] == 2000 and record["mfu"] > 0
    assert record["imbalance"]["tiles"] == 2
    assert [record[f"seconds_{kind}"] for kind in KINDS] == [0.25] * 7
    assert "tok/s" in trainer.said[0] and "MFU" in trainer.said[0]
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars["speed/tokens_per_second"] == 2000
    assert scalars["speed/mfu"] == pytest.approx(record["mfu"], rel=1e-3)
    assert scalars["imbalance/tiles"] == 2
    assert scalars["seconds/forward"] == 0.25
    assert scalars["memory/peak_gib"] == 5


def read_scalars(directory: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory))
    found.Reload()
    return {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
