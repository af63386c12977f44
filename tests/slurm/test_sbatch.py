"""Every job of a chain is queued, or none: refusals, lost answers, signals, on a played Slurm."""

import json
import os
import signal
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import commands, queue_state
from slurm.job import Job, read_record, records
from slurm.run_directory import RunDirectory
from slurm.sbatch import dependency, submit
from tests.slurm.fake_slurm import FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    root = tmp_path / "runs" / "r"
    root.mkdir(parents=True)
    (root / "plan.json").write_text(json.dumps({"code": "abc"}))
    return RunDirectory(root)


@pytest.fixture(scope="module")
def config() -> Config:
    return compose(["cluster=slurm"])


def three(run: RunDirectory) -> list[Job]:
    places = [("segments", "001"), ("segments", "002"), ("verify", "001")]
    kinds = ["segment", "segment", "verify"]
    names = ["r.stage1.001", "r.stage1.002", "r.stage1.verify.001"]
    waits: list[tuple[str, ...]] = [(), (names[0],), (names[0], names[1])]
    return [
        Job(
            name,
            kind,
            run.root / "stage1" / place[0] / place[1],
            "true",
            1.0,
            stage="stage1",
            number=int(place[1]),
            gpus_per_node=2,
            nodes=3,
            after_any=wait,
            after_ok=("7",) if kind == "verify" else (),
        )
        for name, kind, place, wait in zip(names, kinds, places, waits, strict=True)
    ]


def test_jobs_are_queued_in_order_and_recorded(
    fake: FakeSlurm, run: RunDirectory, config: Config
) -> None:
    found = submit(three(run), config, run, ["n7"])
    assert fake.queue() == {
        "100": "r.stage1.001",
        "101": "r.stage1.002",
        "102": "r.stage1.verify.001",
    }
    assert found == list(records(run.root))
    verify = read_record(run.root / "stage1" / "verify" / "001" / "job.json")
    assert verify.job_id == "102" and verify.dependency == "afterok:7,afterany:100:101"
    assert (verify.gpus, verify.hours, verify.code, verify.cluster) == (6, 1.0, "abc", "slurm")
    script = (run.root / "stage1" / "verify" / "001" / "submit.sh").read_text()
    assert "#SBATCH --dependency=afterok:7,afterany:100:101" in script
    assert "#SBATCH --exclude=n7" in script
    # Only what could begin is held, until everything is queued.
    calls = [line for line in fake.calls() if not line.startswith("squeue")]
    assert ["--hold" in call for call in calls] == [True, False, False, False]
    assert calls[-1] == "scontrol release 100" and fake.held() == []
    assert not (run.root / queue_state.SUBMITTING).exists()


@pytest.mark.parametrize("refused", ["r.stage1.001", "r.stage1.002", "r.stage1.verify.001"])
def test_a_refusal_half_way_leaves_nothing(
    fake: FakeSlurm, run: RunDirectory, config: Config, refused: str
) -> None:
    fake.refuse(refused)
    with pytest.raises(ConfigError, match="violates accounting/QOS policy") as error:
        submit(three(run), config, run)
    said = str(error.value)
    assert said.startswith(f"{refused} was not submitted: ") and "nothing is queued" in said
    assert "\n" not in said
    assert fake.queue() == {} and list(records(run.root)) == []
    assert not (run.root / queue_state.SUBMITTING).exists()
    # Nothing was ever released, so nothing ran either.
    assert not [call for call in fake.calls() if "release" in call]
    fake.refuse("none")
    assert len(submit(three(run), config, run)) == 3


def test_a_job_whose_id_was_lost_is_found_and_cancelled(
    fake: FakeSlurm, run: RunDirectory, config: Config
) -> None:
    fake.mute("r.stage1.002")
    with pytest.raises(ConfigError, match="nothing is queued"):
        submit(three(run), config, run)
    assert fake.queue() == {}


def test_jobs_of_others_are_not_touched_by_a_roll_back(
    fake: FakeSlurm, run: RunDirectory, config: Config, tmp_path: Path
) -> None:
    other = RunDirectory(tmp_path / "runs" / "other")
    other.root.mkdir()
    (other.root / "plan.json").write_text('{"code": "abc"}')
    submit(three(other), config, other)
    fake.refuse("r.stage1.verify.001")
    with pytest.raises(ConfigError):
        submit(three(run), config, run)
    assert list(fake.queue()) == ["100", "101", "102"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_lost_connection_leaves_nothing(
    fake: FakeSlurm,
    run: RunDirectory,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    original = commands.sbatch

    def sbatch(script: Path, extra: tuple[str, ...] = ()) -> str:
        if "verify" in str(script):
            os.kill(os.getpid(), number)
        return original(script, extra)

    monkeypatch.setattr(commands, "sbatch", sbatch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match="r.stage1.verify.001 was not submitted"):
        submit(three(run), config, run)
    assert fake.queue() == {} and list(records(run.root)) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_jobs_that_cannot_be_released_do_not_stay(
    fake: FakeSlurm, run: RunDirectory, config: Config
) -> None:
    (fake.root / "bin" / "scontrol").write_text(
        "#!/bin/bash\necho 'slurm_suspend error: Access/permission denied' >&2; exit 1\n"
    )
    with pytest.raises(ConfigError, match="^the jobs cannot begin: .*denied.*nothing is queued"):
        submit(three(run), config, run)
    assert fake.queue() == {} and list(records(run.root)) == []


def test_nohup_is_respected(fake: FakeSlurm, run: RunDirectory, config: Config) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        submit(three(run), config, run)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_leaves_nothing(
    fake: FakeSlurm, run: RunDirectory, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slurm import sbatch

    original = sbatch.write_script

    def write(job: Job, *rest: object) -> None:
        if job.kind == "verify":
            raise OSError(28, "No space left on device", str(job.script))
        original(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sbatch, "write_script", write)
    with pytest.raises(ConfigError, match="No space left on device.*nothing is queued"):
        submit(three(run), config, run)
    assert fake.queue() == {}


def test_what_cannot_be_cancelled_is_named(
    fake: FakeSlurm, run: RunDirectory, config: Config
) -> None:
    fake.refuse("r.stage1.verify.001")
    (fake.root / "bin" / "scancel").write_text(
        "#!/bin/bash\necho 'scancel: error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    with pytest.raises(ConfigError, match="cancel 100 101 by hand"):
        submit(three(run), config, run)
    # They stay known, so that `make cancel` finds them.
    assert [record.job_id for record in records(run.root)] == ["100", "101"]


def test_live_jobs_are_known_by_comment_and_by_record(
    fake: FakeSlurm, run: RunDirectory, config: Config, tmp_path: Path
) -> None:
    submit(three(run), config, run)
    (run.root / "stage1" / "segments" / "002" / "job.json").unlink()  # a submit that was killed
    queue = queue_state.ask(run)
    assert list(queue.jobs) == ["100", "101", "102"] and queue.of_user == 3
    sorted_jobs = queue_state.sort(queue.jobs)
    assert sorted_jobs.segments == {"stage1": ("100", "101")}
    assert sorted_jobs.verifiers == {"stage1": "102"} and sorted_jobs.export is None
    # A Slurm set up anew gave one of our ids to a job of somebody else.
    row = (fake.root / "queue" / "100").read_text()
    (fake.root / "queue" / "100").write_text(
        row.replace("r.stage1.001", "other").replace("amalia-vl:", "")
    )
    assert list(queue_state.live(run)) == ["101", "102"]
    moved = RunDirectory(tmp_path / "elsewhere")
    assert queue_state.live(moved) == {}


def test_a_killed_submission_is_recognised(
    fake: FakeSlurm, run: RunDirectory, config: Config
) -> None:
    submit(three(run), config, run)
    row = fake.root / "queue" / "100"
    row.write_text(row.read_text().replace("\x1fNone\x1f", "\x1fJobHeldUser\x1f"))
    queue = queue_state.ask(run)
    # Held by its owner for a reason of their own, unless the marker tells otherwise.
    assert queue_state.held_by_a_cut_submission(run, queue) == []
    (run.root / queue_state.SUBMITTING).touch()
    assert queue_state.held_by_a_cut_submission(run, queue) == ["100"]
    submit([], config, run, release=["100"])
    assert fake.held() == [] and not (run.root / queue_state.SUBMITTING).exists()


def test_dependencies_are_names_or_ids(run: RunDirectory) -> None:
    first, second, verify = three(run)
    assert dependency(first, {}) == ""
    assert dependency(second, {"r.stage1.001": "5"}) == "afterany:5"
    ids = {"r.stage1.001": "5", "r.stage1.002": "6"}
    assert dependency(verify, ids) == "afterok:7,afterany:5:6"


def test_a_damaged_plan_is_named(run: RunDirectory, config: Config) -> None:
    (run.root / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"plan.json does not name the run's code"):
        submit([], config, run)
