"""The command for arrays, and a whole array on this machine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from slurm import arrays
from slurm.array_element import STOPPED
from slurm.array_items import TaskFolder, read_wave
from slurm.array_request import parse

REPOSITORY = Path(__file__).resolve().parents[2]


def test_parse() -> None:
    request = parse(
        ["task=validate", "run=r", "cluster=mn5", "cluster.hours=3", "+cluster.site.sbatch.x=y"]
        + [
            "elements=5",
            "throttle=2",
            "hours=0.5",
            "dry=1",
            "only=[a,b]",
            "data.images.max_pixels=9",
        ]
    )
    assert request.asked.overrides == ("run=r", "data.images.max_pixels=9")
    assert len(request.overrides) == 5
    assert (request.elements, request.throttle, request.hours) == (5, 2, 0.5)
    assert request.dry and not request.yes and request.asked.names("only") == ["a", "b"]
    assert "stage=stage3" in parse(["task=reference"]).overrides
    for words, cause in (
        (["run=r"], "the tasks are"),
        (["task=all"], "the tasks are"),
        (["task=shards", "throttle=0"], "positive whole number"),
        (["task=shards", "elements=1.5"], "positive whole number"),
        (["task=shards", "hours=-1"], "positive number"),
        (["task=validate", "parts=3"], "parts= is for task=shards or reference"),
        (["task=shards", "dry=perhaps"], "neither true nor false"),
    ):
        with pytest.raises(ConfigError, match=cause):
            parse(words)


class Here:
    """A run on cluster=local whose items are lines of a file."""

    def __init__(self, root: Path, lines: list[str]) -> None:
        self.root, self.file = root, root / "items"
        self.folder = TaskFolder.of(root / "runs" / "r", "commands")
        self.file.write_text("\n".join(lines))

    def __call__(self, *words: str) -> int:
        base = ["task=commands", f"file={self.file}", f"runs_dir={self.root / 'runs'}", "run=r"]
        return arrays.main([*base, *words])


def touch(path: Path) -> str:
    return f"timeit -n1 -r1 \"open('{path}', 'a').write('x')\""


def test_local_array_goes_on_where_it_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marks = [tmp_path / f"mark{number}" for number in range(3)]
    needed = tmp_path / "needed"
    lines = [f"i{number} {touch(mark)}" for number, mark in enumerate(marks)]
    lines.insert(1, f"needs timeit -n1 -r1 \"open('{needed}')\"")
    here = Here(tmp_path, lines)
    assert here("dry=1") == 0 and not any(mark.exists() for mark in marks)
    assert here() == 1
    out, err = capfd.readouterr()
    assert "1 items failed: needs" in err and "No such file" in out
    assert here.folder.record("failed", "needs")["said"].startswith("FileNotFoundError")
    needed.touch()
    assert here("throttle=2") == 0
    assert "4 items, 3 done, 1 to do" in capfd.readouterr().out
    assert [mark.read_text() for mark in marks] == ["x", "x", "x"]
    assert here() == 0
    assert [mark.read_text() for mark in marks] == ["x", "x", "x"]
    assert "i0" in (here.folder.wave(1) / "log_0.out").read_text()


def test_local_array_runs_some_at_a_time(tmp_path: Path) -> None:
    sleep = 'timeit -n1 -r1 "import time; time.sleep(0.4)"'
    here = Here(tmp_path, [f"i{number} {sleep}" for number in range(6)])
    assert here("throttle=3") == 0
    assert len(list(here.folder.wave(1).glob("log_*.out"))) == 3
    marks = [record for _, record in here.folder.records("done")]
    assert _most_at_once(marks) == 3


def _most_at_once(marks: list[dict[str, float]]) -> int:
    events = sorted([(m["began"], 1) for m in marks] + [(m["ended"], -1) for m in marks])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def test_interrupted_local_array_ends_its_item_first(tmp_path: Path) -> None:
    lines = [f'i{n} timeit -n1 -r1 "import time; print(0); time.sleep(1)"' for n in range(3)]
    here = Here(tmp_path, lines)
    words = ["task=commands", f"file={here.file}", f"runs_dir={tmp_path / 'runs'}", "run=r"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slurm.arrays", *words],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 60
    while not here.folder.record("begun", "i0") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == STOPPED
    assert b"stopped by SIGINT; the same command goes on" in errors
    assert here.folder.count("done") == 1 and here.folder.count("failed") == 0


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Here(tmp_path, ["a this"])
    assert here("run=a b") == 1
    assert here("nonsense=1") == 1
    assert here("cluster=nowhere") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert arrays.main(["continue", str(tmp_path)]) == 1
    here.folder.root.mkdir(parents=True, exist_ok=True)
    for folder in (here.folder.root, tmp_path / "runs" / "r"):
        (folder / "STOP").touch()
        assert here() == 1
        assert f"{folder}/STOP is there" in capsys.readouterr().err
        (folder / "STOP").unlink()


def test_dry_run_writes_scripts_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    here = Here(tmp_path, [f"i{number} this" for number in range(9)])
    limits = "+cluster.site.queues={bulk: {hours: 24, submitted: 5}}"
    words = ["cluster=slurm", "cluster.detect=false", "cluster.qos=bulk", limits, "dry=1"]
    assert here(*words, "elements=9", "throttle=2") == 0
    script = (here.folder.wave(1) / "submit.sh").read_text()
    assert "#SBATCH --array=0-3%2" in script and "slurm.array_element" in script
    assert (here.folder.root / "001-next" / "submit.sh").is_file()
    wave = read_wave(here.folder.wave(1))
    assert (len(wave.elements), wave.waiting, wave.per_element) == (4, 5, 1)
    assert "5 more elements" in capsys.readouterr().out
    assert here(*words) == 0  # within the limit by itself, under the same number
    wave = read_wave(here.folder.wave(1))
    assert (len(wave.elements), wave.waiting, wave.per_element) == (5, 0, 2)
    assert json.loads((tmp_path / "runs" / "r" / "plan.json").read_text())["code"]
