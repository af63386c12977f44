"""Parts of the demo are done once, again when their input changed, and timed over attempts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.phases import Phase, PhaseFailed, PhaseRecord, command
from tools.run_demo import phases


def test_done_once_and_again_when_the_input_changes(tmp_path: Path) -> None:
    source, result = tmp_path / "in", tmp_path / "out"
    done: list[str] = []
    source.write_text("a")

    def work() -> None:
        done.append(source.read_text())
        result.write_text("x")

    discarded: list[bool] = []
    phase = Phase("p", "w", work, [result], [source], discarded.append)
    PhaseRecord(tmp_path).run(phase)
    PhaseRecord(tmp_path).run(phase)
    assert done == ["a"] and discarded == []
    source.write_text("b")
    PhaseRecord(tmp_path).run(phase)
    assert done == ["a", "b"] and discarded == [True]
    (tmp_path / "phases.json").unlink()
    PhaseRecord(tmp_path).run(phase)
    assert discarded == [True, False], "outputs of which nothing is known"
    result.unlink()
    PhaseRecord(tmp_path).run(phase)
    assert len(done) == 4


def test_time_adds_up_over_a_failed_attempt(tmp_path: Path) -> None:
    result = tmp_path / "out"

    def fail() -> None:
        time.sleep(0.05)
        raise ValueError("no space")

    def work() -> None:
        time.sleep(0.05)
        result.write_text("x")

    with pytest.raises(ValueError, match="no space"):
        PhaseRecord(tmp_path).run(Phase("p", "w", fail, [result]))
    PhaseRecord(tmp_path).run(Phase("p", "w", work, [result]))
    entry = json.loads((tmp_path / "phases.json").read_text())["p"]
    assert entry["seconds"] >= 0.1
    PhaseRecord(tmp_path).run(Phase("p", "w", fail, [result]))  # skipped
    assert json.loads((tmp_path / "phases.json").read_text())["p"] == entry


def test_a_part_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PhaseFailed, match="ended without writing"):
        PhaseRecord(tmp_path).run(Phase("p", "w", lambda: None, [tmp_path / "out"]))
    with pytest.raises(PhaseFailed, match="exit code 1"):
        command("tools.report", "run=", "nonsense")
    (tmp_path / "phases.json").write_text("{")
    with pytest.raises(PhaseFailed, match="is damaged"):
        PhaseRecord(tmp_path)


def test_the_demo_has_tensor_parallelism_and_scores_held_out_last(tmp_path: Path) -> None:
    found = phases("demo", tmp_path, ["stage2:stage.steps=9", "model.max_tiles=2"])
    names = [phase.name for phase in found]
    assert names[:4] == ["data", "backbones", "import", "shards"]
    assert names[-1] == "held_out" and len(set(names)) == len(names)
    words = {phase.name: getattr(phase.work, "args", ()) for phase in found}
    assert "parallel=tp2" in words["stage1"]
    assert "stage2:stage.steps=9" in words["stage2"]
    assert not [word for word in words["stage1"] if "stage2:" in word]
    for name in ("backbones", "import", "shards", "stage1"):
        assert "model.max_tiles=2" in words[name]


def test_ending_the_driver_ends_what_it_started(tmp_path: Path) -> None:
    """SIGTERM to the process that runs `command` reaches the program within."""
    (tmp_path / "sleeper.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    driver = (
        "import signal, sys\n"
        "from tools.phases import command\n"
        "from tools.run_demo import _end\n"
        "signal.signal(signal.SIGTERM, _end)\n"
        "command('sleeper')\n"
    )
    repository = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{repository}:{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
