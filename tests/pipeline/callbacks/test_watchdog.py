"""A hang ends the job, and every rank tells where it stood."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.callbacks.watchdog import HUNG, Watchdog
from pipeline.timers import CHECKPOINT
from tests.pipeline.callbacks.fake_trainer import event
from tests.pipeline.small_run import SmallRun, metrics, start

PATIENCE = 30.0


class Ended:
    """Stands for os._exit."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


def trainer(phase: str = "backward-compute") -> Any:
    return SimpleNamespace(
        ranks=SimpleNamespace(rank=3, world_size=8),
        state=SimpleNamespace(step=11),
        timers=SimpleNamespace(running=phase),
    )


@pytest.fixture
def ended() -> Ended:
    return Ended()


@pytest.fixture
def watched(tmp_path: Path, ended: Ended) -> Iterator[Watchdog]:
    watchdog = Watchdog(tmp_path, 0.2, ended, grace=0.2)
    yield watchdog
    watchdog.on_exit()


def stuck_in_this_function(ended: Ended) -> bool:
    return ended.happened.wait(PATIENCE)


def test_names_rank_step_phase_and_place(
    watched: Watchdog, ended: Ended, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watched.on_start(trainer())
    assert stuck_in_this_function(ended)
    assert ended.codes == [HUNG]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: hang: rank 3 of 8 on ")
    assert "in step 12, backward-compute, at " in line and "threading.py" in line
    (path,) = (tmp_path / "hangs").iterdir()
    assert str(path) in line and path.name == "step_00000012_rank_00003.txt"
    text = path.read_text()
    assert text.startswith("rank 3 of 8") and "in stuck_in_this_function" in text


def test_progress_is_no_hang(watched: Watchdog, ended: Ended) -> None:
    watched.on_start(trainer())
    for _ in range(8):
        time.sleep(0.1)
        watched.on_step(trainer(), event(seconds=0.01))
    assert not ended.codes


def test_slow_steps_and_saves_get_more_time(tmp_path: Path) -> None:
    run = trainer()
    before = set(threading.enumerate())
    watchdog = Watchdog(tmp_path, 0)  # watches nothing, but knows its limit
    watchdog.on_start(run)
    assert set(threading.enumerate()) <= before
    watchdog.seconds = 60.0
    assert watchdog.limit == 60
    watchdog.on_step(run, event(seconds=100.0))
    watchdog.on_step(run, event(seconds=1.0))
    assert watchdog.limit == 500
    run.timers.running = CHECKPOINT
    assert watchdog.limit == 1500


def test_ends_with_the_training(watched: Watchdog, ended: Ended) -> None:
    watched.on_start(trainer())
    watched.on_exit()
    time.sleep(0.5)
    assert not ended.codes


def test_a_file_system_that_refuses_does_not_keep_the_job(
    tmp_path: Path, ended: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hangs").write_text("a file where the directory should be")
    watchdog = Watchdog(tmp_path, 0.2, ended, grace=0.2)
    watchdog.on_start(trainer())
    assert ended.happened.wait(PATIENCE)
    assert "could not be written" in capfd.readouterr().err


def test_a_rank_that_stands_still_ends_the_others(small_run: SmallRun, stage1_dir: Path) -> None:
    """SIGSTOP, as a frozen node: the other rank says that it waits, in which step, and leaves."""
    config = small_run.config(
        "stage2",
        "parallel=dp2",
        "stage.steps=100000",
        "stage.checkpoint.every=100000",
        "cluster.hang_minutes=0.1",
        f"init_from={stage1_dir}",
        run="hang",
    )
    processes = start(config)
    path = small_run.stage_dir(config) / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 4 * PATIENCE
        while not path.is_file() or not path.read_text().count("\n"):
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.05)
        os.kill(processes[1].pid, signal.SIGSTOP)
        output = processes[0].communicate(timeout=4 * PATIENCE)[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == HUNG, output
    last = output.splitlines()[-1]
    step = len(metrics(config)) + 1
    assert last.startswith("error: hang: rank 0 of 2") and f" in step {step}, " in last
    (report,) = (small_run.stage_dir(config) / "hangs").glob("step_*_rank_00000.txt")
    assert "in _run_steps" in report.read_text()
