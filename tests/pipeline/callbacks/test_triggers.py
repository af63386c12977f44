"""Files that steer a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.triggers import TriggerFiles
from tests.pipeline.callbacks.fake_trainer import FakeTrainer, event


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "run" / "stage1"
    directory.mkdir(parents=True)
    return directory


def test_save_is_done_once(stage: Path) -> None:
    trainer: Any = FakeTrainer()
    triggers = TriggerFiles(stage)
    triggers.on_start(trainer)
    (stage / "SAVE").touch()
    triggers.on_step(trainer, event(1))
    triggers.on_step(trainer, event(2))
    assert (trainer.saves, trainer.stop_reason) == (1, "")
    assert not (stage / "SAVE").exists()


def test_exit_stops_this_segment_only(stage: Path) -> None:
    trainer: Any = FakeTrainer()
    (stage / "EXIT").touch()
    triggers = TriggerFiles(stage)
    triggers.on_start(trainer)  # meant for the segment before
    triggers.on_step(trainer, event(1))
    assert trainer.stop_reason == ""
    (stage / "EXIT").touch()
    triggers.on_step(trainer, event(2))
    assert trainer.stop_reason == "EXIT file"
    assert not (stage / "EXIT").exists()


@pytest.mark.parametrize("place", ["run", "stage"])
def test_stop_stays_until_somebody_removes_it(stage: Path, place: str) -> None:
    trainer: Any = FakeTrainer()
    stop = (stage if place == "stage" else stage.parent) / "STOP"
    triggers = TriggerFiles(stage)
    triggers.on_start(trainer)
    triggers.on_step(trainer, event(1))
    assert trainer.stop_reason == ""
    stop.touch()
    triggers.on_step(trainer, event(2))
    assert trainer.stop_reason == str(stop)
    assert stop.exists()


def test_one_rank_looks(stage: Path) -> None:
    trainer: Any = FakeTrainer(reports=False)
    (stage / "SAVE").touch()
    (stage / "STOP").touch()
    triggers = TriggerFiles(stage)
    triggers.on_start(trainer)
    triggers.on_step(trainer, event(1))
    assert (trainer.saves, trainer.stop_reason) == (0, "")
    assert (stage / "SAVE").exists()
