"""One element: items one after the other, failures, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from slurm import array_element
from slurm.array_element import STOPPED, Stop, run_element
from slurm.array_items import Item, TaskFolder
from slurm.array_process import Ending, Processes, last_line
from tests.slurm.array_toys import item, wave_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder.of(tmp_path / "run", "commands")


def test_element_goes_on_after_a_failure(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    wave = wave_of(items)
    folder.end(items[0], wave, 0, {})
    started = []

    def start(one: Item) -> Ending:
        started.append(one.name)
        return Ending(3 if one.name == "b" else 0, f"said {one.name}")

    assert run_element(folder, wave, 0, Stop(), start) == 1
    assert started == ["b", "c"]
    failed, done = folder.record("failed", "b"), folder.record("done", "c")
    assert (failed["code"], failed["said"]) == (3, "said b")
    assert done["ended"] >= done["began"] > 0 and done["said"] == "said c"
    assert run_element(folder, wave, 0, Stop(), lambda one: Ending(0, "")) == 0
    with pytest.raises(ConfigError, match="no element 1"):
        run_element(folder, wave, 1, Stop(), start)


def test_element_stops_between_items(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    stop = Stop()

    def start(one: Item) -> Ending:
        stop.ask("stopped by SIGUSR2")
        return Ending(0, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert folder.missing(items) == list(items[1:])


def test_item_that_is_killed_with_its_element_has_not_failed(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "ab")
    stop = Stop()

    def start(one: Item) -> Ending:
        stop.ask("stopped by SIGTERM")
        return Ending(128 + signal.SIGTERM, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert folder.count("failed") == folder.count("done") == 0
    # Killed by somebody else, it has.
    quiet = run_element(folder, wave_of(items), 0, Stop(), lambda one: Ending(143, "killed"))
    assert quiet == 1 and folder.count("failed") == 2


def test_element_begins_nothing_that_would_not_fit(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    stop = Stop(ends=time.monotonic() + 40)

    def start(one: Item) -> Ending:
        stop.longest = 20.0
        return Ending(0, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert len(folder.missing(items)) == 2


def test_stop_file_ends_an_element(folder: TaskFolder, capsys: pytest.CaptureFixture[str]) -> None:
    items = tuple(item(name) for name in "ab")
    folder.root.mkdir(parents=True)
    (folder.root.parent.parent / "STOP").touch()
    assert run_element(folder, wave_of(items), 0, Stop(), lambda one: Ending(0, "")) == STOPPED
    assert "STOP is there" in capsys.readouterr().out


def test_process_output_is_passed_on_and_its_end_told(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    ending = Processes().run(item("a", shell="echo one; echo two >&2; exit 5"))
    assert ending == Ending(5, "two")
    assert capfdbinary.readouterr().out == b"one\ntwo\n"
    noise = "echo 0: error: no room; echo 0: bye; echo srun: error: acc1: task 0: Exited; exit 1"
    assert Processes().run(item("a", shell=noise)) == Ending(1, "error: no room")
    assert Processes().run(item("a", "timeit", "-n1", "-r1", "1/0")).said.startswith("ZeroDiv")
    assert Processes().run(item("a", shell="kill -9 $$")).code == 137
    assert Processes().run(item("a", shell="exit 0")) == Ending(0, "it said nothing")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a\nb\n\n  \n", "b"),
        ("10 %\r50 %\r100 %", "100 %"),
        ("\x1b[31mred\x1b[0m\n", "red"),
        ("", "it said nothing"),
        ("x" * 1000, "x" * 500),
    ],
)
def test_last_line(output: str, expected: str) -> None:
    assert last_line(output) == expected


def test_signal_lets_the_item_end(folder: TaskFolder) -> None:
    """The real command, with SIGUSR2 while its first item runs; again, it does the second."""
    sleep = "import time; print('begun', flush=True); time.sleep(1)"
    items = tuple(item(name, "timeit", "-n1", "-r1", sleep) for name in "ab")
    folder.wave(1).mkdir(parents=True)
    wave_of(items).write(folder.wave(1))
    command = [sys.executable, "-m", "slurm.array_element", str(folder.wave(1))]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while b"begun" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGUSR2)
    process.stdout.read()
    assert process.wait(timeout=30) == STOPPED
    assert folder.missing(items) == [items[1]]
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=30).returncode == 0
    assert folder.missing(items) == []


def test_element_command_refuses_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert array_element.main([str(tmp_path), "x"]) == 2
    before = {number: signal.getsignal(number) for number in array_element.STOP_SIGNALS}
    try:
        assert array_element.main([str(tmp_path), "0"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "items.json does not exist" in capsys.readouterr().err
