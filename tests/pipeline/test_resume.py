"""A run that is killed, stopped or moved to another layout goes on with the same numbers."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from conf.schema import Config
from tests.fork_server import ForkServer
from tests.pipeline.forked_training import start_forked
from tests.pipeline.small_run import SmallRun, losses, metrics, start, train_in_pool

STEPS = "stage.steps=16"
TIMEOUT = 120.0


def _lines(config: Config) -> int:
    path = Path(config.runs_dir) / config.run / config.stage.name / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def _kill_after(server: ForkServer, config: Config, lines: int, delay: float, number: int) -> str:
    """Start, wait for `lines` lines of metrics plus `delay` seconds, signal; rank 0's output."""
    folder = Path(config.runs_dir) / config.run / f"after{lines}"
    ranks = start_forked(server, config, folder)
    deadline = time.monotonic() + TIMEOUT
    while _lines(config) < lines and ranks[0].poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    for rank in ranks:
        if number == signal.SIGKILL:
            rank.kill()
        else:
            rank.send_signal(number)
    for rank in ranks:
        rank.wait(TIMEOUT)
    return ranks[0].output()


@pytest.fixture(scope="module")
def unbroken(small_run: SmallRun, trained: dict[str, str]) -> list[float]:
    config = _config(small_run, "unbroken")
    train_in_pool(config)
    return losses(config)


def _config(small_run: SmallRun, name: str, *more: str) -> Config:
    stage1 = small_run.root / "run" / "stage1"
    return small_run.config("stage2", STEPS, f"init_from={stage1}", *more, run=name)


def test_killed_at_random_moments(
    small_run: SmallRun, unbroken: list[float], fork_server: ForkServer
) -> None:
    """SIGKILL three times, in a step, in a save or between; bit for bit the same losses."""
    config = _config(small_run, "killed")
    chance = random.Random(20261121)
    for lines in (1, 5, 10):
        _kill_after(fork_server, config, lines, chance.uniform(0, 2.0), signal.SIGKILL)
    train_in_pool(config)
    assert losses(config) == unbroken


def test_sigterm_saves_and_stops(
    small_run: SmallRun, unbroken: list[float], fork_server: ForkServer
) -> None:
    config = _config(small_run, "terminated", "stage.checkpoint.every=1000")
    output = _kill_after(fork_server, config, 3, 0.0, signal.SIGTERM)
    assert "the same command resumes" in output
    done = len(metrics(config))
    assert 3 <= done < 16
    assert "resumes after step" in train_in_pool(config)
    assert losses(config) == unbroken


@pytest.mark.parametrize("moment", ["between two saves", "in a save"])
def test_a_signal_to_every_process_of_a_rank(
    small_run: SmallRun, unbroken: list[float], moment: str
) -> None:
    """Slurm signals the helpers that write checkpoints too; they must not die of it."""
    config = _config(small_run, f"group-{moment[:2]}", "stage.checkpoint.every=4")
    stage = small_run.stage_dir(config)
    first = stage / "checkpoints" / "step_00000004" / "MANIFEST.json"
    processes = start(config)
    deadline = time.monotonic() + TIMEOUT
    while not (first.exists() if moment != "in a save" else any(stage.glob("*/.step*/*.distcp"))):
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    output = processes[0].communicate(timeout=TIMEOUT)[0]
    assert processes[0].returncode == 128 + signal.SIGTERM, output
    assert "resumes after step" in train_in_pool(config)
    assert losses(config) == unbroken


def test_exit_file(small_run: SmallRun, unbroken: list[float], fork_server: ForkServer) -> None:
    config = _config(small_run, "exit-file", "stage.checkpoint.every=1000")
    (rank,) = start_forked(fork_server, config, small_run.stage_dir(config))
    while _lines(config) < 2:
        assert rank.poll() is None, rank.output()
        time.sleep(0.01)
    (small_run.stage_dir(config) / "EXIT").touch()
    assert rank.wait(TIMEOUT) == 128 + signal.SIGTERM
    train_in_pool(config)
    assert losses(config) == unbroken


def test_goes_on_under_another_layout(
    small_run: SmallRun, unbroken: list[float], fork_server: ForkServer
) -> None:
    """Begun at TP 2, stopped, ended at PP 2; then with the distributed optimizer at DP 2."""
    config = _config(small_run, "moved", "parallel=tp2")
    _kill_after(fork_server, config, 3, 0.0, signal.SIGTERM)
    stopped = len(metrics(config))
    assert stopped < 16
    moved = _config(small_run, "moved", "parallel=pp2")
    assert f"resumes after step {stopped}" in train_in_pool(moved)
    assert losses(moved) == pytest.approx(unbroken, abs=1e-5)


def test_distributed_optimizer_resumes(
    small_run: SmallRun, unbroken: list[float], fork_server: ForkServer
) -> None:
    config = _config(small_run, "sharded", "parallel=dp2_dist")
    _kill_after(fork_server, config, 5, 0.0, signal.SIGTERM)
    train_in_pool(config)
    assert losses(config) == pytest.approx(unbroken, abs=1e-5)


def test_damaged_checkpoint_is_passed_over(small_run: SmallRun, unbroken: list[float]) -> None:
    config = _config(small_run, "damaged")
    shutil.copytree(small_run.root / "unbroken" / "stage2", small_run.stage_dir(config))
    (small_run.stage_dir(config) / "DONE.json").unlink()
    newest = sorted((small_run.stage_dir(config) / "checkpoints").iterdir())[-1]
    victim = next(newest.glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0xFF
    victim.write_bytes(data)
    output = train_in_pool(config)
    assert "passed over a damaged checkpoint" in output and victim.name in output
    assert "resumes after step 14 of 16" in output
    assert losses(config) == unbroken


def test_full_disk(small_run: SmallRun, unbroken: list[float]) -> None:
    """A save that cannot be written: one line, nothing half-written left, and it goes on later."""
    config = _config(small_run, "full", "stage.checkpoint.every=4")
    (process,) = start(config, file_bytes=100_000)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last
    assert list((small_run.stage_dir(config) / "checkpoints").iterdir()) == []
    train_in_pool(config)
    assert losses(config) == unbroken


def test_changed_plan_is_refused(small_run: SmallRun, unbroken: list[float]) -> None:
    config = _config(small_run, "replanned")
    shutil.copytree(small_run.root / "unbroken" / "stage2", small_run.stage_dir(config))
    (small_run.stage_dir(config) / "DONE.json").unlink()
    config.data.mix = {"stage2": {"chats": 1.0}}
    assert "another data plan" in train_in_pool(config, expect=1).splitlines()[-1]
