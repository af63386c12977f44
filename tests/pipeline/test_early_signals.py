"""A signal before the first step ends a rank with 143, whatever the main thread is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.small_run import REPOSITORY, SmallRun, start

TIMEOUT = 60.0
HEAD = """
import os, signal, sys, threading, time
from pipeline import early_signals
early_signals.arm()
"""


def run(body: str, number: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run HEAD and `body` in a process, send it a signal once it has said `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + body],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    if number is not None:
        assert said == "ready\n"
        process.send_signal(number)
    said += process.communicate(timeout=TIMEOUT)[0]
    return subprocess.CompletedProcess([], process.returncode, said)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_while_blocked(name: str) -> None:
    """The main thread waits in C where no Python handler runs, as in a collective."""
    body = """
import ctypes
print("ready", flush=True)
libc = ctypes.CDLL(None)
libc.pause.restype = ctypes.c_int
while True:
    libc.pause()
"""
    ended = run(body, getattr(signal, name))
    assert ended.returncode == 143
    assert f"{name} before the first step" in ended.stdout


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    ended = run('print("ready", flush=True); time.sleep(60)', signal.SIGUSR2)
    assert (ended.returncode, ended.stdout) == (143, "ready\n")


def test_disarmed() -> None:
    """Handlers of the loop get the signal, and the helper thread is gone."""
    body = """
got = []
signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
early_signals.disarm()
os.kill(os.getpid(), signal.SIGUSR2)
time.sleep(0.3)
print("got", got == [signal.SIGUSR2], threading.active_count())
"""
    ended = run(body)
    assert (ended.returncode, ended.stdout) == (0, "got True 1\n")


def test_a_child_is_its_own() -> None:
    """A forked child dies of a signal by default and does not end its parent."""
    body = """
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
status = os.waitpid(child, 0)[1]
time.sleep(0.2)
print("child", os.WTERMSIG(status))
"""
    ended = run(body)
    assert (ended.returncode, ended.stdout) == (0, "child 15\n")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 2.5])
def test_training_that_has_not_begun(small_run: SmallRun, delay: float) -> None:
    """Two ranks, one of which never comes to the rendezvous; and one still importing torch."""
    config = small_run.config("stage1", "parallel=dp2", run=f"early-{delay}")
    processes = start(config)
    os.killpg(processes[1].pid, signal.SIGKILL)
    time.sleep(delay)
    processes[0].send_signal(signal.SIGUSR2)
    output = processes[0].communicate(timeout=TIMEOUT)[0]
    processes[1].communicate(timeout=TIMEOUT)
    assert processes[0].returncode == 143, output
    assert "before the first step" in output
    directory: Path = small_run.stage_dir(config)
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml"]
