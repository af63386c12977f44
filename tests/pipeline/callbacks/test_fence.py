"""A job that another has replaced does not write beside it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.fence import Fence, TakenOver, owner
from pipeline.files import write_json
from tests.pipeline.callbacks.fake_trainer import FakeTrainer, event
from tests.pipeline.small_run import SmallRun, losses, metrics, start, train

TIMEOUT = 120.0


def fence(directory: Path, attempt: str, now: list[float] | None = None) -> Fence:
    times = [0.0] if now is None else now
    return Fence(directory, attempt, lambda: times[0])


def test_claims_what_nobody_owns(tmp_path: Path) -> None:
    trainer: Any = FakeTrainer()
    assert owner(tmp_path) is None
    first = fence(tmp_path, "7-0-1")
    first.on_start(trainer)
    assert owner(tmp_path) == "7-0-1"
    first.on_save(trainer)
    first.on_end(trainer)


def test_a_late_start_does_not_take_over_its_successor(tmp_path: Path) -> None:
    """The launcher has given the stage to another before these ranks got so far."""
    write_json(tmp_path / "OWNER", {"attempt": "8-0-1"})
    with pytest.raises(TakenOver, match="8-0-1, this is 7-0-1"):
        fence(tmp_path, "7-0-1").on_start(FakeTrainer())  # type: ignore[arg-type]
    assert owner(tmp_path) == "8-0-1"


def test_started_by_hand_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTEMPT_ID", raising=False)
    trainer: Any = FakeTrainer()
    launched = fence(tmp_path, "7-0-1")
    launched.on_start(trainer)
    by_hand = Fence(tmp_path)
    by_hand.on_start(trainer)
    by_hand.on_save(trainer)
    with pytest.raises(TakenOver):
        launched.on_save(trainer)
    with pytest.raises(TakenOver):
        launched.on_end(trainer)


def test_looks_every_second_only(tmp_path: Path) -> None:
    trainer: Any = FakeTrainer()
    now = [10.0]
    ours = fence(tmp_path, "7-0-1", now)
    ours.on_start(trainer)
    write_json(tmp_path / "OWNER", {"attempt": "8-0-1"})
    now[0] = 10.5
    ours.on_step(trainer, event())
    now[0] = 11.1
    with pytest.raises(TakenOver):
        ours.on_step(trainer, event())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"other": 1}'])
def test_a_damaged_file_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / "OWNER").write_text(text)
    with pytest.raises(TakenOver, match="unknown"):
        fence(tmp_path, "7-0-1").check()


def test_other_ranks_neither_claim_nor_look(tmp_path: Path) -> None:
    trainer: Any = FakeTrainer(reports=False)
    other = fence(tmp_path, "7-0-1")
    other.on_start(trainer)
    assert owner(tmp_path) is None
    other.on_save(trainer)


@pytest.mark.slow
def test_an_orphan_ends_before_it_writes(
    small_run: SmallRun, trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run.config(
        "stage1", "stage.steps=2000", "stage.checkpoint.every=1999", run="orphan"
    )
    directory = small_run.stage_dir(config)
    directory.mkdir(parents=True)
    write_json(directory / "OWNER", {"attempt": "7-0-1"})
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "ATTEMPT_ID", "7-0-1")
        (process,) = start(config)
    path = directory / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    write_json(directory / "OWNER", {"attempt": "8-0-1"})
    (directory / "EXIT").touch()  # asks for a checkpoint at once
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: another job has taken over")
    assert not (directory / "checkpoints").exists()
    assert json.loads((directory / "OWNER").read_text())["attempt"] == "8-0-1"
    # The successor is not disturbed by what is there.
    again = small_run.config("stage1", run="orphan")
    train(again)
    assert losses(again) == losses(small_run.config("stage1"))
    assert len(metrics(again)) == 6
