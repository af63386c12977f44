"""A job that ends by itself before its time is over."""

from __future__ import annotations

import os
from typing import Any

import pytest

from conf.schema.errors import ConfigError
from pipeline.callbacks.walltime import Walltime, stop_after
from tests.pipeline.callbacks.fake_trainer import FakeTrainer, event
from tests.pipeline.small_run import SmallRun, losses, metrics, start, train


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(limit: float | None, step: float, save: float = 0.0, saves: tuple[int, ...] = ()) -> Any:
    """Steps of `step` seconds, saved after those named, until a stop is asked for; the trainer."""
    clock, trainer = Clock(), FakeTrainer()
    walltime = Walltime(limit, clock.now, clock)
    since = 0.0
    for number in range(1, 101):
        clock.now += step
        walltime.on_step(trainer, event(number, step + since))  # type: ignore[arg-type]
        since = 0.0
        trainer.state.step = number
        if trainer.stop_reason:
            trainer.time_left = 1000.0 + (limit or 0) - clock.now
            break
        if number in saves:
            clock.now += save
            since = save
            walltime.on_saved(trainer, save)  # type: ignore[arg-type]
    return trainer


def test_one_more_step_and_a_save_fit_before_the_end() -> None:
    trainer = run(limit=100, step=5, save=20, saves=(2,))
    assert trainer.stop_reason == "walltime"
    assert trainer.time_left >= 5 + 20
    assert trainer.time_left < 2 * (2 * 5 + 20)  # and not much earlier
    assert len(trainer.said) == 1 and "nearly over" in trainer.said[0]


def test_the_step_in_which_ranks_agree_is_counted() -> None:
    trainer = run(limit=200, step=20, save=5, saves=(2,))
    assert 20 + 5 <= trainer.time_left < 2 * (2 * 20 + 5)


def test_a_save_is_not_counted_as_a_slow_step() -> None:
    """The event of the step after a save holds the save's seconds as well."""
    patient = run(limit=200, step=1, save=30, saves=(2, 4))
    assert patient.time_left < 1.5 * (2 * 1 + 30) + 1


def test_a_save_in_the_background_is_waited_for_too() -> None:
    """What it took in all counts, not what training stood still for; so does one in progress."""
    clock, trainer = Clock(), FakeTrainer()
    walltime = Walltime(200, clock.now, clock)
    walltime.on_step(trainer, event(1, 1.0))  # type: ignore[arg-type]
    walltime.on_saved(trainer, 2.0)  # type: ignore[arg-type]
    walltime.on_committed(trainer, 40.0)  # type: ignore[arg-type]

    def stops(left: float, writing: float | None) -> bool:
        clock.now, trainer.writing_seconds = 1200.0 - left, writing
        walltime.on_step(trainer, event(2, 1.0))  # type: ignore[arg-type]
        return trainer.stop_reason == "walltime"

    assert not stops(1.5 * (2 + 40) + 1, None)
    assert not stops(1.5 * (2 + 40 + 30) + 1, 10.0)
    assert stops(1.5 * (2 + 40 + 30) - 1, 10.0)


def test_without_a_limit_it_never_stops() -> None:
    assert run(limit=None, step=5).stop_reason == ""
    assert run(limit=1e6, step=5).stop_reason == ""


def test_a_limit_that_has_passed_stops_after_the_first_step() -> None:
    assert run(limit=-3, step=5).state.step == 1


def test_only_rank_0_watches() -> None:
    trainer = FakeTrainer(reports=False)
    Walltime(1.0, 0.0, lambda: 99.0).on_step(trainer, event())  # type: ignore[arg-type]
    assert trainer.stop_reason == ""


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOP_AFTER_SECONDS", raising=False)
    assert stop_after() is None
    monkeypatch.setenv("STOP_AFTER_SECONDS", "17.5")
    assert stop_after() == 17.5
    monkeypatch.setenv("STOP_AFTER_SECONDS", "soon")
    with pytest.raises(ConfigError, match="STOP_AFTER_SECONDS='soon'"):
        stop_after()


@pytest.mark.slow
def test_the_training_command_stops_and_goes_on(
    small_run: SmallRun, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a signal: a checkpoint, exit code 143, then the same numbers."""
    config = small_run.config("stage1", "stage.checkpoint.every=1000", run="walltime")
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "STOP_AFTER_SECONDS", "1")  # less than importing torch takes
        (process,) = start(config)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert "nearly over" in output and "the checkpoint is saved" in output
    assert 1 <= len(metrics(config)) < 6
    assert "resumes after step" in train(config)
    assert losses(config) == losses(small_run.config("stage1"))
    assert [line["of"] for line in metrics(config)] == [6] * 6
