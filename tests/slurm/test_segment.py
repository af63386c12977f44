"""What a segment decides, without Slurm: refusals, history, restarts, giving up, bad nodes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.snapshot import code_digest, file_digests, listing
from slurm import attempts, exclude, segment
from slurm.commands import SlurmError
from slurm.files import write_text
from slurm.job import JobRecord
from slurm.log_cause import cause
from slurm.run_directory import REPOSITORY
from slurm.segment import AGAIN, NOTHING_TO_DO


class Run:
    """A run directory with one stage, and what Slurm would say in the environment."""

    def __init__(self, root: Path, restarts: int = 2, hours: float = 1.0) -> None:
        self.root = root
        self.stage = root / "stage1"
        code = root / "code" / "models"
        code.mkdir(parents=True)
        (code / "one.py").write_text("1\n")
        (code / "two.py").write_text("2\n")
        (root / "plan.json").write_text(json.dumps({"code": code_digest(root / "code")}))
        (root / "code.sha256").write_text(listing(file_digests(root / "code")))
        self.stage.mkdir()
        cluster = f"{{restarts: {restarts}, hours: {hours}, stop_minutes: 5, exclude: [old1]}}"
        (self.stage / "config.yaml").write_text(f"cluster: {cluster}\n")
        self.environment: dict[str, str] = {}
        self.starts = 0
        self.job(17)

    def job(self, job_id: int, restart: int = 0, number: int = 1) -> None:
        """From now on in this job and segment."""
        self.segment = self.stage / "segments" / f"{number:03d}"
        self.segment.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "SLURM_JOB_ID": str(job_id),
            "SLURM_RESTART_COUNT": str(restart),
            "SLURM_JOB_NODELIST": "acc[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_JOB_END_TIME": str(int(time.time()) + 3600),
        }

    def begin(self) -> int:
        self.starts += 1
        name = f"{self.environment['SLURM_JOB_ID']}-{self.starts}"
        self.environment["ATTEMPT_ID"] = name
        return segment.begin(self.stage, self.segment, self.environment)

    def end(self, code: int, terminated: bool = False) -> int:
        return segment.end(self.stage, self.segment, code, terminated, self.environment)

    def log(self, text: str) -> None:
        with (self.segment / "log.out").open("a") as file:
            file.write(text)

    def steps(self, reached: int) -> None:
        lines = [json.dumps({"step": step}) for step in range(1, reached + 1)]
        (self.stage / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))

    def done(self) -> None:
        """DONE.json with a whole checkpoint."""
        checkpoint = self.stage / "checkpoints" / "step_00000004"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"12345")
        manifest = json.dumps({"files": {"weights": [5, "-"]}}).encode()
        (checkpoint / "MANIFEST.json").write_bytes(manifest)
        done = {
            "checkpoint": "checkpoints/step_00000004",
            "checkpoint_digest": hashlib.sha256(manifest).hexdigest(),
        }
        (self.stage / "DONE.json").write_text(json.dumps(done))

    @property
    def history(self) -> list[attempts.Attempt]:
        return attempts.read(self.stage)

    @property
    def outcomes(self) -> list[str]:
        return [attempt.outcome for attempt in self.history]

    @property
    def failed(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.stage / "FAILED.json").read_text())
        return value

    def queue(self, job_id: int, number: int, stage: str = "stage1", kind: str = "segment") -> None:
        """A job of the chain, as sbatch.py records it."""
        folder = "segments" if kind == "segment" else kind
        directory = self.root / stage / folder / f"{number:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        JobRecord(
            job_id=str(job_id),
            name=f"r.{stage}.{number:03d}",
            kind=kind,
            stage=stage,
            number=number,
            directory=str(directory),
            cluster="slurm",
            nodes=2,
            gpus=8,
            hours=1.0,
            dependency="",
            submitted=float(job_id),
            code="",
        ).write()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def slurm_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Slurm's programs that were started; squeue knows jobs 18 to 29 as pending."""
    calls: list[list[str]] = []

    def run_program(words: list[str], timeout: float = 30) -> str:
        calls.append(list(words))
        return ""

    class Pending:
        state = "PENDING"

        def __init__(self, number: int) -> None:
            self.job_id = str(number)

    monkeypatch.setattr("slurm.commands.run", run_program)
    monkeypatch.setattr("slurm.commands.squeue", lambda: [Pending(n) for n in range(18, 30)])
    return calls


def test_begins_and_is_done(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.queue(17, 1)
    assert run.begin() == 0
    assert (run.stage / "current.log").readlink() == Path("segments/001/log.out")
    assert json.loads((run.stage / "OWNER").read_text())["attempt"] == "17-1"
    assert "attempt 1 of stage1 begins on acc[1-2]" in capsys.readouterr().out
    (started,) = run.history
    assert (started.job_id, started.nodes, started.gpus) == ("17", ("acc1", "acc2"), 8)
    run.steps(4)
    run.done()
    assert run.end(0) == 0
    (ended,) = run.history
    assert (ended.outcome, ended.reached, ended.code) == ("done", 4, 0)
    assert ended.gpu_hours(time.time()) == pytest.approx(0, abs=0.01)
    run.job(18, number=2)
    assert run.begin() == NOTHING_TO_DO
    assert len(run.history) == 1


@pytest.mark.parametrize("place", ["run", "stage"])
def test_stop_refuses_until_it_is_removed(
    run: Run, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = (run.root if place == "run" else run.stage) / "STOP"
    stop.touch()
    assert run.begin() == 1
    assert f"asked to stop by {stop}; remove it" in capsys.readouterr().err
    assert run.history == []
    stop.unlink()
    assert run.begin() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda code: (code / "one.py").write_text("3\n"), "models/one.py was edited"),
        (lambda code: (code / "two.py").unlink(), "models/two.py is missing"),
        (lambda code: (code / "new.py").write_text(""), "models/new.py was added"),
    ],
)
def test_an_edited_snapshot_does_not_start(
    run: Run, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run.root / "code" / "models")
    assert run.begin() == 1
    assert said in capsys.readouterr().err
    assert run.history == []


def test_a_forged_listing_names_no_file(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.root / "code" / "models" / "one.py").write_text("3\n")
    forged = {**file_digests(run.root / "code"), "models/two.py": "0" * 64}
    (run.root / "code.sha256").write_text(listing(forged))
    assert run.begin() == 1
    error = capsys.readouterr().err
    assert "is not what was submitted;" in error and ".py" not in error


@pytest.mark.parametrize("code", [143, 140, 138, 130])
def test_stopped_is_no_failure(run: Run, code: int) -> None:
    for number in (1, 2, 3):
        run.job(16 + number, number=number)
        assert run.begin() == 0
        assert run.end(code) == 0
    assert run.outcomes == ["stopped"] * 3
    assert not (run.stage / "FAILED.json").exists()


@pytest.mark.parametrize(
    ("preempted", "again"),
    [("1795259263", True), ("1795251600", False), ("None", False), ("", False)],
)
def test_a_preempted_job_queues_itself_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, preempted: str, again: bool
) -> None:
    """Not when it was preempted in an earlier life only, or is merely asked to stop."""
    calls: list[list[str]] = []

    def program(words: list[str], timeout: float = 30) -> str:
        calls.append(list(words))
        times = f"StartTime=1795257000 PreemptTime={preempted}" if preempted else ""
        return f"JobId=17 JobState=RUNNING {times} SuspendTime=None\n"

    monkeypatch.setattr("slurm.commands.run", program)
    assert run.begin() == 0
    assert run.end(143) == 0
    assert run.outcomes == ["stopped"]
    assert (["scontrol", "requeue", "17"] in calls) == again


def test_without_an_answer_the_next_segment_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(words: list[str], timeout: float = 30) -> str:
        raise SlurmError("slurmctld does not answer")

    monkeypatch.setattr("slurm.commands.run", program)
    assert run.begin() == 0
    assert run.end(143) == 0
    assert "the next segment goes on" in capsys.readouterr().out


def test_terminated_ranks_are_not_started_again(run: Run) -> None:
    run.begin()
    assert run.end(137, terminated=True) == 0
    assert run.outcomes == ["stopped"]


def test_a_failure_starts_again_while_restarts_are_left(run: Run) -> None:
    for reached in (2, 4, 6):  # it makes steps, so it is not stuck
        assert run.begin() == 0
        run.steps(reached)
        assert run.end(1) == (AGAIN if reached < 6 else 1)
    assert run.outcomes == ["failed"] * 3
    run.job(18, number=2)
    assert run.begin() == 0
    run.steps(8)
    assert run.end(1) == AGAIN  # another job, its own restarts


def test_a_requeued_job_has_its_own_restarts(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", restarts=1)
    for reached, expected in ((2, AGAIN), (4, 9)):
        run.begin()
        run.steps(reached)
        assert run.end(9) == expected
    run.job(17, restart=1)
    run.begin()
    run.steps(6)
    assert run.end(9) == AGAIN


def test_no_restart_without_time(run: Run) -> None:
    """stop_minutes is 5: less than ten minutes are not worth another start."""
    for left, expected in ((590, 1), (610, AGAIN)):
        run.begin()
        run.steps(left)
        run.environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + left)
        assert run.end(1) == expected


def test_two_failures_without_a_step_give_up(
    run: Run, slurm_calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for job_id, number in ((17, 1), (18, 2), (19, 3)):
        run.queue(job_id, number)
    run.queue(20, 1, kind="verify")
    run.queue(21, 1, stage="stage2")
    run.begin()
    run.log("0: error: stage.lr trains nothing\nsrun: error: acc1: task 0: Exited with exit 1\n")
    assert run.end(1) == AGAIN
    run.begin()
    run.log("0: error: stage.lr trains nothing at all\nslurmstepd: error: *** STEP\n")
    assert run.end(1) == 1
    assert run.failed["log_line"] == "error: stage.lr trains nothing at all"
    assert run.failed["code"] == 1
    assert "2 attempts failed without a step beyond 0" in run.failed["reason"]
    # The later segments of this stage only; the verifier waits for them and runs at once.
    assert slurm_calls == [["scancel", "--state=PENDING", "--me", "18", "19"]]
    assert "gives up" in capsys.readouterr().out
    run.job(18, number=2)
    assert run.begin() == 1
    assert "trains nothing at all" in capsys.readouterr().err
    assert "gave up" in (segment.verify(run.stage) or "")
    # Whoever mends it and removes the file gets two attempts again.
    (run.stage / "FAILED.json").unlink()
    run.begin()
    assert run.end(1) == AGAIN


def test_killed_attempts_are_closed_and_do_not_count(run: Run) -> None:
    for restart in range(4):
        run.job(17, restart)
        assert run.begin() == 0  # killed with its batch shell, as by a requeue
    assert run.end(1) == AGAIN
    assert run.outcomes == ["killed"] * 3 + ["failed"]
    assert not (run.stage / "FAILED.json").exists()


def test_a_killed_attempt_ended_when_it_last_wrote(run: Run) -> None:
    run.begin()
    run.log("step 1\n")
    run.job(17, restart=1)
    run.begin()
    killed = run.history[0]
    assert killed.ended == pytest.approx((run.segment / "log.out").stat().st_mtime, abs=0.01)


def test_steps_made_again_after_a_resume_are_no_new_ones(run: Run) -> None:
    """metrics.jsonl is cut back to the checkpoint; what was reached before is remembered."""
    run.begin()
    run.steps(10)
    assert run.end(1) == AGAIN
    run.begin()
    run.steps(8)
    assert run.end(1) == AGAIN
    assert run.history[-1].reached == 10
    run.begin()
    run.steps(9)
    assert run.end(1) == 1
    assert "step beyond 10" in run.failed["reason"]


def test_ended_without_done_is_a_failure(run: Run) -> None:
    run.begin()
    assert run.end(0) == AGAIN
    run.begin()
    assert run.end(0) == 1
    assert run.outcomes == ["failed"] * 2


def test_an_orphan_decides_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.begin()
    orphan = dict(run.environment)
    run.job(17, restart=1)
    run.begin()
    assert segment.end(run.stage, run.segment, 1, environment=orphan) == 1
    assert "taken over" in capsys.readouterr().out
    assert run.outcomes == ["killed", ""]


def test_a_bad_node_is_excluded_and_does_not_count(run: Run, slurm_calls: list[list[str]]) -> None:
    run.queue(17, 1)
    run.queue(18, 2)
    run.queue(21, 1, stage="stage2")
    run.queue(40, 1, stage="stage3")  # has ended
    report = run.segment / "preflight"
    report.mkdir()
    run.begin()
    rank = {"attempt": "17-1", "rank": 0, "node": "acc1", "phase": "rendezvous", "problem": "p"}
    write_text(report / "rank_0.json", json.dumps(rank))
    bad = {"attempt": "17-1", "nodes": {"acc2": "no GPU", "--all": "forged"}}
    write_text(report / "bad_nodes.json", json.dumps(bad))
    assert run.end(1) == 1  # not again on the same nodes
    assert run.outcomes == ["bad_node"]
    assert exclude.read(run.root) == ["acc2"]
    updates = [words for words in slurm_calls if words[0] == "scontrol"]
    assert updates == [
        ["scontrol", "update", f"JobId={job}", "ExcNodeList=old1,acc2"] for job in (18, 21)
    ]
    # Named again, it is a failure like others: excluding it has not helped.
    run.begin()
    for name in ("rank_0.json", "bad_nodes.json"):
        text = (report / name).read_text().replace("17-1", "17-2")
        write_text(report / name, text)
    assert run.end(1) == AGAIN
    assert run.outcomes == ["bad_node", "failed"]


def test_a_node_none_of_whose_ranks_began(run: Run, slurm_calls: list[list[str]]) -> None:
    report = run.segment / "preflight"
    report.mkdir()
    run.begin()
    rank = {"attempt": "17-1", "rank": 0, "node": "acc1", "phase": "data", "problem": None}
    write_text(report / "rank_0.json", json.dumps(rank))
    assert run.end(1) == 1
    assert exclude.entries(run.root)["acc2"]["reason"] == "no rank of it began"


def test_a_failure_of_training_blames_no_node(run: Run) -> None:
    report = run.segment / "preflight"
    report.mkdir()
    run.begin()
    for number, node in enumerate(("acc1", "acc2")):
        rank = {"attempt": "17-1", "rank": number, "node": node, "phase": "passed"}
        write_text(report / f"rank_{number}.json", json.dumps(rank))
    assert run.end(1) == AGAIN
    assert exclude.read(run.root) == []


def test_a_damaged_exclude_list_hides_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.root / "exclude_nodes.json").write_text("{")
    run.begin()
    assert run.end(1) == AGAIN
    assert run.outcomes == ["failed"]
    assert "exclude_nodes.json is damaged" in capsys.readouterr().err


def test_without_slurm_nothing_starts_again(run: Run) -> None:
    """The local executor: no job, no variables."""
    assert segment.begin(run.stage, run.segment, {}) == 0
    (started,) = run.history
    assert (started.job_id, started.gpus, len(started.nodes)) == ("", 0, 1)
    assert segment.end(run.stage, run.segment, 1, environment={}) == 1
    assert segment.begin(run.stage, run.segment, {}) == 0
    assert segment.end(run.stage, run.segment, 1, environment={}, restarts=5) == 1
    assert (run.stage / "FAILED.json").is_file()


def test_verify(run: Run) -> None:
    assert "not done" in (segment.verify(run.stage) or "")
    run.done()
    assert segment.verify(run.stage) is None
    weights = run.stage / "checkpoints" / "step_00000004" / "weights"
    weights.write_bytes(b"1234")
    assert "has 4 bytes, not 5" in (segment.verify(run.stage) or "")
    weights.unlink()
    assert f"{weights} is missing" in (segment.verify(run.stage) or "")
    weights.write_bytes(b"12345")
    manifest = weights.parent / "MANIFEST.json"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    assert "not the one that" in (segment.verify(run.stage) or "")
    manifest.unlink()
    assert f"{manifest} is missing" in (segment.verify(run.stage) or "")


def test_verify_stays_in_the_stage(run: Run) -> None:
    run.done()
    (run.stage / "checkpoints").rename(run.root / "checkpoints")
    text = (run.stage / "DONE.json").read_text().replace("checkpoints/", "../checkpoints/")
    (run.stage / "DONE.json").write_text(text)
    assert "outside its folder" in (segment.verify(run.stage) or "")


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_verify_distrusts_done(run: Run, text: str) -> None:
    (run.stage / "DONE.json").write_text(text)
    reason = segment.verify(run.stage)
    assert reason is not None and "DONE.json" in reason


def test_the_cause_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.out"
    before = "0: error: of an attempt before\n"
    log.write_text(
        before + "1: [stage1] step 3\n1: Traceback (most recent call last):\n"
        "1: ValueError: bad shard\n0: Terminated by a peer\nsrun: error: acc2: task 1: Exited\n"
    )
    assert cause(log, len(before)) == "ValueError: bad shard"
    assert cause(log, log.stat().st_size) == "it said nothing"
    log.write_text("srun: error: Unable to create step\n")
    assert cause(log) == "srun: error: Unable to create step"
    assert cause(log, 10**9) == "srun: error: Unable to create step"  # the log was replaced
    assert "cannot be read" in cause(tmp_path / "none")


def test_the_command_line_starts_fast_and_without_torch(run: Run) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "slurm.segment", "begin"]
    done = subprocess.run(
        [*command, str(run.stage), str(run.segment)],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", **run.environment, "ATTEMPT_ID": "17-1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "slurm.attempts" in imported
    for heavy in ("torch", "hydra", "omegaconf", "numpy", "submitit", "megatron"):
        assert heavy not in imported
    refused = subprocess.run(
        [sys.executable, "-m", "slurm.segment", "verify", str(run.stage)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: stage1 not done") and refused.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(run.stage / "attempts.jsonl"))

    monkeypatch.setattr("slurm.attempts.append_line", full)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "acc1")
    assert segment.main(["begin", str(run.stage), str(run.segment)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1
