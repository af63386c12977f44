"""The submit command against a real Slurm, with ranks that take no time."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm import commands
from slurm.job import JobRecord, records
from tests.slurm import toy_code
from tests.slurm.test_submit import ALL, World
from tests.slurm.throwaway import ThrowAwaySlurm

pytestmark = pytest.mark.slurm


class SlurmWorld(World):
    """A run on a throw-away Slurm: two ranks on two nodes, a spare segment, no restarts."""

    def __init__(self, root: Path, slurm: ThrowAwaySlurm) -> None:
        super().__init__(root)
        self.slurm = slurm
        self.base += ["cluster=slurm", "parallel=dp2", "stage.gpu_hours=null", "cluster.hours=0.2"]
        self.base += ["cluster.stop_minutes=1", "cluster.restarts=0"]

    def does(self, stage: str, *words: str) -> None:
        (self.run / f"{stage}.does").write_text(" ".join(words))

    def ids(self) -> dict[str, str]:
        """Name of each job that was submitted, in order -> its id."""
        return {record.name: record.job_id for record in records(self.run)}

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            logs = {str(path): path.read_text() for path in self.run.rglob("log.out")}
            assert time.monotonic() < end, f"{self.slurm.run('squeue').stdout}\n{logs}"
            time.sleep(0.2)

    def wait_for_all(self) -> None:
        self.wait_until(lambda: not self.slurm.job_ids())

    def states(self) -> dict[str, str]:
        return {name: self.slurm.state(job_id) for name, job_id in self.ids().items()}


@pytest.fixture
def world(tmp_path: Path, slurm: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch) -> SlurmWorld:
    source = toy_code.write(tmp_path / "source")
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", source)
    return SlurmWorld(tmp_path, slurm)


def test_a_pipeline_runs_by_itself_to_its_export(
    world: SlurmWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.does("stage2", "stop", "done")
    assert world.submit(ALL, "export=true") == 0
    said = capsys.readouterr().out
    assert "10 jobs queued" in said and "test.stage2.001 to 002" in said
    # The same command while it runs queues nothing.
    assert world.submit(ALL, "export=true") == 0
    assert "nothing to queue: " in capsys.readouterr().out and len(world.ids()) == 10
    world.wait_for_all()
    states = world.states()
    # A spare segment that is not needed is cancelled, or ends at once.
    assert states.pop("test.stage1.002") in ("CANCELLED", "COMPLETED")
    assert states.pop("test.stage3.002") in ("CANCELLED", "COMPLETED")
    assert set(states.values()) == {"COMPLETED"}
    assert (world.run / "hf").is_dir()
    log = (world.run / "stage2" / "segments" / "002" / "log.out").read_text()
    assert "0: step 2 done" in log  # the second segment, rank 0
    places = [json.loads((world.run / "stage1" / f"rank_{r}.json").read_text()) for r in (0, 1)]
    assert [place["RANK"] for place in places] == ["0", "1"]
    assert {place["LOCAL_RANK"] for place in places} == {"0"}
    assert len({place["node"] for place in places}) == 2
    assert {place["WORLD_SIZE"] for place in places} == {"2"}
    assert len({(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places}) == 1
    assert 0 < int(places[0]["STOP_AFTER_SECONDS"]) <= 0.2 * 3600 - 60
    # The snapshot, not the working tree; paths in the configuration hold as they were given.
    assert places[0]["file"] == str(world.run / "code" / "pipeline" / "train.py")
    assert places[0]["cwd"] == str(Path.cwd())
    capsys.readouterr()
    assert world.submit(ALL, "export=true") == 0
    assert "everything is done" in capsys.readouterr().out


def test_a_failing_stage_cancels_its_successors_and_the_command_tries_again(
    world: SlurmWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.does("stage1", "fail", "fail")
    assert world.submit("stages=[stage1,stage2]") == 0
    world.wait_for_all()
    states = world.states()
    assert states["test.stage1.001"] == states["test.stage1.verify.001"] == "FAILED"
    for name in ("test.stage2.001", "test.stage2.002", "test.stage2.verify.001"):
        assert states[name] == "CANCELLED"
    assert world.slurm.job(world.ids()["test.stage1.001"])["ExitCode"] == "7:0"
    failed = json.loads((world.run / "stage1" / "FAILED.json").read_text())
    assert "the data is torn" in failed["reason"]
    assert not (world.run / "stage2" / "starts").exists()
    capsys.readouterr()
    world.does("stage1")
    assert world.submit("stages=[stage1,stage2]") == 0
    assert "stage1: had failed before, see " in capsys.readouterr().out
    world.wait_for_all()
    assert (world.run / "stage2" / "DONE.json").exists()
    assert (world.run / "stage1" / "FAILED-1.json").exists()
    assert "test.stage1.003" in world.ids()


def test_cancelled_jobs_are_submitted_again_alone(world: SlurmWorld) -> None:
    world.does("stage2", "hang", "done")
    assert world.submit(ALL) == 0
    world.wait_until(lambda: (world.run / "stage2" / "starts").exists())
    before = world.ids()
    world.slurm.run("scancel", *(before[name] for name in before if ".stage2." in name))
    world.wait_for_all()
    assert world.submit(ALL) == 0
    new = [name for name in world.ids() if name not in before]
    assert not [name for name in new if ".stage1." in name] and "test.stage3.003" in new
    world.wait_for_all()
    assert (world.run / "stage3" / "DONE.json").exists()


def test_a_cancelled_first_segment_does_not_let_the_second_one_overtake(world: SlurmWorld) -> None:
    world.does("stage1", "hang")
    assert world.submit("stages=[stage1,stage2]") == 0
    world.wait_until(lambda: (world.run / "stage1" / "starts").exists())
    ids = world.ids()
    world.slurm.run("scancel", ids["test.stage2.001"])
    time.sleep(2)
    assert world.slurm.state(ids["test.stage2.002"]) == "PENDING"
    world.slurm.run("scancel", "--batch", "--signal=KILL", ids["test.stage1.001"])
    world.wait_for_all()
    # Stage 1 went on in its spare segment, stage 2 in its own.
    assert (world.run / "stage2" / "DONE.json").exists()


def test_other_code_or_settings_are_refused_while_jobs_are_queued(
    world: SlurmWorld, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    world.does("stage1", "hang")
    assert world.submit("stages=[stage1]") == 0
    number = len(world.slurm.job_ids())
    capsys.readouterr()
    assert world.submit("stages=[stage1]", "cluster.hours=0.3") == 1
    said = capsys.readouterr().err
    assert "cluster.hours: 0.2 -> 0.3" in said and "make cancel" in said and said.count("\n") == 1
    (tmp_path / "source" / "pipeline" / "train.py").write_text("edited = 1\n")
    assert world.submit("stages=[stage1,stage2]") == 1
    said = capsys.readouterr().err
    assert "other code than is here now" in said and "test.stage1.001" in said
    assert world.submit("stages=[stage1]", "cluster=local", "parallel=single") == 1
    assert "are queued or running" in capsys.readouterr().err
    assert len(world.slurm.job_ids()) == number


def test_a_stop_file_is_obeyed_and_told(
    world: SlurmWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.run / "STOP").touch()
    assert world.submit("stages=[stage1]") == 1
    said = capsys.readouterr().err
    assert "remove the file to go on" in said and said.count("\n") == 1
    assert world.slurm.job_ids() == []


def test_an_edited_snapshot_does_not_run(world: SlurmWorld) -> None:
    world.does("stage1", "hang")
    assert world.submit("stages=[stage1]") == 0
    world.wait_until(lambda: (world.run / "stage1" / "starts").exists())
    with (world.run / "code" / "pipeline" / "train.py").open("a") as file:
        file.write("# edited\n")
    world.slurm.run("scancel", "--batch", "--signal=KILL", world.ids()["test.stage1.001"])
    world.wait_for_all()
    log = (world.run / "stage1" / "segments" / "002" / "log.out").read_text()
    assert "pipeline/train.py was edited" in log
    assert not (world.run / "stage1" / "DONE.json").exists()


@pytest.mark.parametrize("when", ["before the second job.json", "before the release"])
def test_a_submission_that_was_killed_is_completed(
    world: SlurmWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    write = JobRecord.write

    def killed(job_id: str) -> None:
        raise SystemExit(when)

    def killed_at_the_second(record: JobRecord) -> None:
        if record.name == "test.stage1.002":
            raise SystemExit(when)
        write(record)

    with monkeypatch.context() as patch:
        if when == "before the release":
            patch.setattr(commands, "release", killed)
        else:
            patch.setattr(JobRecord, "write", killed_at_the_second)
        with pytest.raises(SystemExit):
            world.submit("stages=[stage1]")
    first = world.ids()["test.stage1.001"]
    assert world.slurm.job(first)["Reason"] == "JobHeldUser"
    assert world.submit("stages=[stage1]") == 0
    assert f"released {first}" in capsys.readouterr().out
    world.wait_for_all()
    assert (world.run / "stage1" / "DONE.json").exists()
    assert len([job for job in commands.squeue() if job.comment.endswith(str(world.run))]) == 3


def test_slurm_is_asked_without_queueing(
    world: SlurmWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.submit(ALL, "export=true", "test_only=true") == 0
    said = capsys.readouterr().out
    assert said.count(" to start at ") == 10 and "nothing is queued" in said
    assert world.slurm.job_ids() == [] and world.ids() == {}
    # What Slurm would refuse is told, and nothing is queued by the real command either.
    for words in (["test_only=true"], []):
        assert world.submit("stages=[stage1]", "cluster.partition=nonsense", *words) == 1
        assert "partition" in capsys.readouterr().err
        assert world.slurm.job_ids() == [] and world.ids() == {}


def test_a_submit_limit_half_way_leaves_nothing(
    tmp_path: Path,
    slurm_accounting: ThrowAwaySlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", toy_code.write(tmp_path / "source"))
    world = SlurmWorld(tmp_path, slurm_accounting)
    user = f"user={slurm_accounting.user}"
    limit = ("sacctmgr", "-i", "modify", "user", "where", user, "set")
    slurm_accounting.run(*limit, "MaxSubmitJobs=4")
    try:
        assert world.submit(ALL) == 1
        said = capsys.readouterr().err
        assert "test.stage2.002 was not submitted" in said and "nothing is queued" in said
        assert said.count("\n") == 1
        world.wait_for_all()
        assert world.ids() == {} and not (world.run / "stage1" / "starts").exists()
        assert world.submit("stages=[stage1]") == 0
        world.wait_for_all()
        assert (world.run / "stage1" / "DONE.json").exists()
    finally:
        slurm_accounting.run(*limit, "MaxSubmitJobs=-1")
