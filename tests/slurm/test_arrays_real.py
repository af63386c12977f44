"""Arrays on a real Slurm: limits, throttle, waves, killed elements, and failures that end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from slurm import arrays
from slurm.array_items import TaskFolder
from slurm.array_tasks import TASKS
from slurm.job import RECORD, read_record
from tests.data_shards import toys
from tests.slurm import processes
from tests.slurm.throwaway import ThrowAwaySlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
LIMIT, THROTTLE = 100, 8


class Array:
    """A run whose items are lines of a file; each item notes its starts in `starts/`."""

    def __init__(self, root: Path, slurm: ThrowAwaySlurm) -> None:
        self.root, self.slurm, self.file = root, slurm, root / "items"
        self.folder = TaskFolder.of(root / "runs" / "r", "commands")
        (root / "starts").mkdir()
        (root / "pids").mkdir()
        self.names: list[str] = []

    def add(self, name: str, after: str = "pass") -> None:
        """An item that notes its start and process, then does `after`."""
        self.names.append(name)
        note = f"open('{self.root}/starts/{name}', 'a').write('x')"
        pid = f"import os; open('{self.root}/pids/{name}', 'w').write(str(os.getpid()))"
        with self.file.open("a") as file:
            file.write(f'{name} timeit -n1 -r1 "{note}; {pid}; {after}"\n')

    def submit(self, *words: str) -> int:
        base = ["task=commands", f"file={self.file}", f"runs_dir={self.root / 'runs'}", "run=r"]
        return arrays.main([*base, "cluster=slurm", "hours=0.1", *words])

    def starts(self, name: str) -> int:
        path = self.root / "starts" / name
        return len(path.read_text()) if path.exists() else 0

    def pid(self, name: str) -> int:
        text = (self.root / "pids" / name).read_text()
        return int(text) if text else 0

    def done(self) -> set[str]:
        return {name for name, _ in self.folder.records("done")}

    def marks(self) -> list[dict[str, Any]]:
        return [record for _, record in self.folder.records("done")]

    def job_id(self, wave: str) -> str:
        """Slurm's id of a wave's job, "" until it is submitted."""
        path = self.folder.root / wave / RECORD
        return read_record(path).job_id if path.exists() else ""

    def log(self, wave: str) -> str:
        return (self.folder.root / f"{wave}-next" / "log.out").read_text()

    def live(self) -> int:
        return len(self.slurm.run("squeue", "--noheader", "--array").stdout.splitlines())

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.story()
            time.sleep(0.1)

    def story(self) -> str:
        logs = [f"{path}: {path.read_text()}" for path in self.folder.root.glob("*-next/log.out")]
        queue = self.slurm.run("squeue", "--format=%i %j %T %r").stdout
        return "\n".join([f"{len(self.done())} done", queue, *logs])


def most_at_once(marks: list[dict[str, Any]]) -> int:
    """Most items that ran at one time, by their markers."""
    events = sorted([(m["began"], 1) for m in marks] + [(m["ended"], -1) for m in marks])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def test_300_elements_under_a_limit_of_100_with_a_third_killed(
    slurm_accounting: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm itself refuses job 101 of the QoS. A third of each wave is cancelled before it runs."""
    array = Array(tmp_path, slurm_accounting)
    for number in range(300):
        array.add(f"i{number:03d}")
    words = ["cluster.account=ehpc01", "cluster.qos=bulk"]  # its limit is detected
    assert array.submit(*words, "elements=300", f"throttle={THROTTLE}") == 0, capsys.readouterr()
    assert "99 elements" in capsys.readouterr().out
    most_queued, killed = 0, 0
    waves = {"001": 33, "002": 33, "003": 34}  # how many of it are killed
    end = time.monotonic() + 240
    while len(array.done()) < 300 and time.monotonic() < end:
        for wave, count in list(waves.items()):
            job_id = array.job_id(wave)
            if job_id:
                size = read_record(array.folder.root / wave / RECORD).elements or 0
                slurm_accounting.run("scancel", f"{job_id}_[{size - count}-{size - 1}]")
                killed += count
                del waves[wave]
        most_queued = max(most_queued, array.live())
        time.sleep(0.3)
    assert array.done() == set(array.names), array.story()
    array.wait(lambda: array.live() == 0, 20)
    assert killed == 100
    assert {array.starts(name) for name in array.names} == {1}  # only the killed ones, again
    assert LIMIT - 10 < most_queued <= LIMIT
    assert THROTTLE // 2 <= most_at_once(array.marks()) <= THROTTLE
    assert len(array.folder.waves()) >= 5
    assert array.submit(*words) == 0
    assert "300 items, 300 done\nnothing to do" in capsys.readouterr().out


def test_only_killed_elements_are_submitted_again(
    slurm: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = Array(tmp_path, slurm)
    go = tmp_path / "go"
    for name in ("killed", "cancelled"):
        array.add(
            name,
            f"import time; [time.sleep(0.1) for _ in range(300) if not os.path.exists('{go}')]",
        )
    for number in range(4):
        array.add(f"i{number}")
    assert array.submit("elements=6", "throttle=2") == 0
    capsys.readouterr()
    job_id = array.job_id("001")
    array.wait(lambda: array.starts("killed") == array.starts("cancelled") == 1)
    assert array.submit() == 0  # all six are queued or running
    assert "6 queued" in capsys.readouterr().out
    slurm.run("scancel", f"{job_id}_5")  # pending
    assert array.submit() == 0
    assert "1 to do" in capsys.readouterr().out
    after = slurm.job(array.job_id("002"))  # or more than two would run at once
    assert (after["JobState"], after["Dependency"].partition("_")[0]) == (
        "PENDING",
        f"afterany:{job_id}",
    )
    slurm.run("scancel", f"{job_id}_1")
    array.wait(lambda: array.pid("killed") > 0)
    os.kill(array.pid("killed"), 9)
    array.wait(lambda: array.live() == 0)
    assert array.done() == {"i0", "i1", "i2", "i3"}
    assert array.folder.record("failed", "killed")["code"] == 137
    assert array.folder.record("failed", "cancelled") == {}
    go.touch()
    assert array.submit("elements=6") == 0
    assert "6 items, 4 done, 2 to do" in capsys.readouterr().out
    array.wait(lambda: len(array.done()) == 6 and array.live() == 0)
    again = {name for name in array.names if array.starts(name) == 2}
    assert again == {"killed", "cancelled"} and array.starts("i3") == 1
    assert not processes.command(array.pid("cancelled")).startswith("timeit")


def test_items_that_always_fail_do_not_loop(
    slurm: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = Array(tmp_path, slurm)
    array.add("bad", "1/0")
    for number in range(6):
        array.add(f"i{number}")
    limit = "+cluster.site.queues={cpu: {hours: 72, submitted: 4}}"
    assert array.submit("cluster.partition=cpu", limit, "elements=7") == 0
    array.wait(lambda: len(array.done()) == 6 and array.live() == 0)
    assert array.starts("bad") == 2
    assert "1 left out after two failures: bad" in array.log("002")
    assert array.folder.record("failed", "bad")["said"].startswith("ZeroDivisionError")
    capsys.readouterr()
    assert array.submit("cluster.partition=cpu", limit) == 0
    assert "7 items, 6 done, 1 to do" in capsys.readouterr().out
    array.wait(lambda: array.live() == 0)
    assert array.starts("bad") == 3


def test_wave_that_cannot_be_followed_says_what_to_type(
    slurm: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No sbatch inside a job; then a wave that is cancelled before any item of it has started."""
    array = Array(tmp_path, slurm)
    for number in range(4):
        array.add(f"i{number}")
    limit = "+cluster.site.queues={cpu: {hours: 72, submitted: 3}}"
    words = ["cluster.partition=cpu", limit, "elements=4"]
    assert array.submit(*words, 'cluster.site.setup=["export PATH=/nowhere"]') == 0
    array.wait(lambda: array.live() == 0)
    assert array.done() == {"i0", "i1"}
    assert slurm.state(array.job_id("001-next")) == "FAILED"
    assert "sbatch" in array.log("001") or "squeue" in array.log("001")
    assert "give the same command on a login node: python -m slurm.arrays" in array.log("001")
    note = json.loads((array.folder.root / "stopped.json").read_text())
    assert "task=commands" in note["command"]
    slurm.update_node("cpu[1-4]", "drain")
    array.add("i4")
    array.add("i5")
    assert array.submit(*words) == 0
    assert not (array.folder.root / "stopped.json").exists()
    slurm.run("scancel", array.job_id("002"))
    slurm.update_node("cpu[1-4]", "resume")
    array.wait(lambda: array.live() == 0)
    assert "no item of wave 2 was even started" in array.log("002")
    assert array.done() == {"i0", "i1"}


def test_items_of_many_ranks_run_on_several_nodes(
    slurm: ThrowAwaySlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of `reference`: each a step of two ranks, with a place to meet."""
    monkeypatch.setitem(TASKS, "commands", replace(TASKS["commands"], ranks=True))
    array = Array(tmp_path, slurm)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME"]
    for number in range(3):
        place = f"{tmp_path}/i{number}."
        array.add(
            f"i{number}",
            f"open('{place}' + os.environ['RANK'], 'w').write("
            f"' '.join(os.environ[name] for name in {names}))",
        )
    array.add("bad", "1 / int(os.environ['RANK'])")
    assert array.submit("elements=2", "throttle=1") == 0
    array.wait(lambda: array.live() == 0)
    assert array.done() == {"i0", "i1", "i2"}
    failed = array.folder.record("failed", "bad")
    assert failed["code"] in (1, 143)  # 143: srun ended the peer before it was through by itself
    assert "division by zero" in failed["said"]
    ports = [(tmp_path / f"i{number}.0").read_text().split()[4] for number in range(2)]
    assert int(ports[1]) == int(ports[0]) + 1  # the same element's
    for number in range(3):
        ranks = [(tmp_path / f"i{number}.{rank}").read_text().split() for rank in range(2)]
        assert [rank[:3] for rank in ranks] == [["0", "0", "2"], ["1", "0", "2"]]
        assert ranks[0][3:5] == ranks[1][3:5] and ranks[0][3][0].isdigit()
        assert ranks[0][5] != ranks[1][5]  # a node each


def test_validation_finds_damage_and_reads_only_that_again(
    slurm: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = toys.write_tokenizer(tmp_path / "tokenizer")
    rows = toys.write_parquet(tmp_path / "chats.parquet", toys.chat_rows(16))
    data = toys.data_config(tmp_path / "data", tokenizer, chats=SourceConfig(str(rows)))
    digest = ChatTokenizer.from_directory(tokenizer).digest()
    manifest = build_dataset("chats", data.sources["chats"], data, toys.GEOMETRY, digest)
    count = len(manifest.info.shards)
    assert count >= 3
    words = ["task=validate", f"runs_dir={tmp_path / 'runs'}", "run=r", f"data.root={data.root}"]
    words += ["+data.sources={chats: {input: none}}", "only=chats", "shards_per_item=1"]
    words += ["cluster=slurm", "hours=0.1", "elements=2"]
    folder = TaskFolder.of(tmp_path / "runs" / "r", "validate")

    def end() -> None:
        limit = time.monotonic() + 60
        while slurm.job_ids():
            assert time.monotonic() < limit
            time.sleep(0.1)

    path = manifest.shards_directory / manifest.info.shards[1].name
    honest = path.read_bytes()
    at = int(manifest.json_span[manifest.shard == 1][0, 0])
    path.write_bytes(honest[:at] + b"?" + honest[at + 1 :])
    assert arrays.main(words) == 0
    end()
    said = {name: record["said"] for name, record in folder.records("done")}
    assert len(said) == count and folder.count("failed") == 0
    bad = [name for name, line in said.items() if "all good" not in line]
    assert bad == ["chats.000001-000001"]
    assert said[bad[0]].endswith("DAMAGED: 1 samples, 0 shards")
    report = json.loads((folder.root / "reports" / f"{bad[0]}.json").read_text())
    key = manifest.key(int((manifest.shard == 1).argmax()))
    assert [(entry["key"], entry["cause"]) for entry in report["bad"]] == [
        (key, "CRC-32 of its JSON differs")
    ]
    path.write_bytes(honest)
    capsys.readouterr()
    assert arrays.main(words) == 0
    assert f"{count} items, {count - 1} done, 1 to do" in capsys.readouterr().out
    end()
    assert folder.record("done", bad[0])["said"].endswith("all good")


def test_submission_that_was_killed_is_taken_up(
    slurm: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As left by kill -9 before the release: the array is held, its record may be lost."""
    array = Array(tmp_path, slurm)
    for number in range(4):
        array.add(f"i{number}")
    slurm.update_node("cpu[1-4]", "drain")
    assert array.submit("elements=2") == 0
    job_id = array.job_id("001")
    slurm.run("scontrol", "uhold", job_id)
    (array.folder.root / "001" / RECORD).unlink()
    (array.folder.root.parent.parent / ".submitting").touch()
    capsys.readouterr()
    assert array.submit("elements=2") == 0
    assert f"job {job_id} was held" in capsys.readouterr().out
    assert array.folder.waves() == [1]
    slurm.update_node("cpu[1-4]", "resume")
    array.wait(lambda: len(array.done()) == 4 and array.live() == 0)
    assert {array.starts(name) for name in array.names} == {1}


def test_requeued_element_passes_over_what_is_done(slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    array = Array(tmp_path, slurm)
    go = tmp_path / "go"
    array.add("first")
    array.add(
        "second",
        f"import time; [time.sleep(0.1) for _ in range(300) if not os.path.exists('{go}')]",
    )
    assert array.submit("elements=1") == 0
    array.wait(lambda: (array.root / "pids" / "second").exists() and array.pid("second") > 0)
    pid = array.pid("second")
    slurm.run("scontrol", "requeue", f"{array.job_id('001')}_0")
    array.wait(lambda: not processes.alive(pid))
    go.touch()
    array.wait(lambda: len(array.done()) == 2 and array.live() == 0)
    assert (array.starts("first"), array.starts("second")) == (1, 2)
    assert array.folder.count("failed") == 0


def test_nothing_is_half_submitted(
    slurm_accounting: ThrowAwaySlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit of the site that nobody told us, a wrong account, and the dry run of both."""
    array = Array(tmp_path, slurm_accounting)
    for number in range(6):
        array.add(f"i{number}")
    false = ["cluster.qos=acc_debug", "+cluster.site.queues={acc_debug: {hours: 2}}"]
    assert array.submit("cluster.account=ehpc01", *false, "elements=6") == 1
    error = capsys.readouterr().err
    assert "was not submitted" in error and "cluster.site.queues=" in error
    assert array.submit("cluster.account=ehpc99", "elements=6") == 1
    assert "Invalid account" in capsys.readouterr().err
    assert array.live() == 0
    assert array.submit("cluster.account=ehpc01", "test_only=1") == 0
    assert "to start at" in capsys.readouterr().out
    assert array.live() == 0 and not array.done()
