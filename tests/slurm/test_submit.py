"""The submit command with a fake training program: order, resuming, refusing, recording."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import compose, load
from slurm import local
from slurm.run_directory import RunDirectory
from slurm.submit import main
from tests.slurm import toy_code
from tests.slurm.fake_slurm import FakeSlurm

# Does what a stage does to a run directory: fails when told to, else one checkpoint and the end.
FAKE = """
import hashlib, json, os, pathlib, sys
config = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
stage = config.parent
(stage.parent / "environment").write_text(json.dumps(dict(os.environ)))
with open(stage.parent / "ran", "a") as ran:
    ran.write(stage.name + "\\n")
checkpoint = stage / "checkpoints" / "step_0000001"
checkpoint.mkdir(parents=True, exist_ok=True)
manifest = checkpoint / "MANIFEST.json"
manifest.write_text(json.dumps({"files": {}}))
if (stage.parent / f"fail_{stage.name}").exists():
    sys.exit("error: the disk is full; free some space")
if (stage.parent / f"stop_{stage.name}").exists():
    sys.exit(0)
done = {"format": 1, "checkpoint": "checkpoints/step_0000001"}
done["checkpoint_digest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
(stage / "DONE.json").write_text(json.dumps(done))
"""


class World:
    """A folder with all that a run needs, and the command line."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "runs" / "test"
        self.base = [f"runs_dir={root / 'runs'}", "run=test", f"data.root={root / 'shards'}"]
        self.base.append(f"data.tokenizer={root / 'tokenizer'}")
        for name in compose([]).data.sources:
            (root / "shards" / name).mkdir(parents=True)
        (root / "tokenizer").mkdir()
        (self.run / "import").mkdir(parents=True)
        (self.run / "import" / "DONE.json").write_text("{}")

    def submit(self, *arguments: str) -> int:
        return main([*self.base, *arguments])

    def ran(self) -> list[str]:
        path = self.run / "ran"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    monkeypatch.setattr(
        local, "command", lambda path: [sys.executable, str(fake), "--config", str(path)]
    )
    return World(tmp_path)


ALL = "stages=[stage1,stage2,stage3]"


def test_stages_run_in_order_and_only_once(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.submit("stages=[stage2,stage1,stage3]") == 0
    assert world.ran() == ["stage1", "stage2", "stage3"]
    capsys.readouterr()
    assert world.submit(ALL) == 0
    assert world.ran() == ["stage1", "stage2", "stage3"]
    assert capsys.readouterr().out.count("done already") == 3


def test_the_run_directory_tells_what_ran(world: World) -> None:
    assert world.submit("stages=[stage1,stage2]", "stage2:parallel.threads=1") == 1
    assert world.submit("stages=[stage1,stage2]", "stage2:cluster.threads_per_rank=2") == 0
    run = world.run
    assert load(run / "stage1" / "config.yaml").cluster.threads_per_rank == 1
    assert load(run / "stage2" / "config.yaml").cluster.threads_per_rank == 2
    recorded = RunDirectory(run).recorded()
    assert set(recorded) == {"stage1", "stage2"}
    assert recorded["stage2"] == load(run / "stage2" / "config.yaml")
    plan = json.loads((run / "plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == ["stage1", "stage2"]
    assert [stage["state"] for stage in plan["stages"]] == ["run", "run"]
    assert (run / "code" / "conf" / "model" / "tiny.yaml").exists()
    assert (run / "code" / "slurm" / "submit.py").exists()
    environment = (run / "env.txt").read_text()
    assert "python 3." in environment and "hydra-core==" in environment
    assert (run / "stage1" / "current.log").resolve() == run / "stage1" / "segments/001/log.out"
    assert not list(run.rglob("*.tmp"))


def test_a_failure_stops_the_chain_in_one_line_and_the_same_command_goes_on(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    (world.run / "fail_stage2").touch()
    assert world.submit(ALL) == 1
    said = capfd.readouterr().err
    assert "stage2: rank 0 failed" in said and "free some space" in said
    assert "segments/001/log.out" in said and said.count("\n") == 1
    assert world.ran() == ["stage1", "stage2"]
    (world.run / "fail_stage2").unlink()
    assert world.submit(ALL) == 0
    assert world.ran() == ["stage1", "stage2", "stage2", "stage3"]
    link = world.run / "stage2" / "current.log"
    assert link.resolve().parent.name == "002" and not link.readlink().is_absolute()


def test_a_stage_that_ends_early_is_not_done(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    (world.run / "stop_stage1").touch()
    assert world.submit(ALL) != 0
    assert "stopped before its last step" in capfd.readouterr().err
    assert world.ran() == ["stage1"]


def test_a_stage_that_cannot_run_is_refused_before_the_first(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.submit(ALL, "stage3:stage.global_batch_size=6") == 1
    assert "stage3: stage.global_batch_size=6" in capsys.readouterr().err
    assert world.ran() == [] and not (world.run / "stage1").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages=[stage4]"], "the stages are stage1, stage2, stage3"),
        ([], "no stages"),
        (["stages=[stage1]", "stage2:parallel=tp2"], "stages= does not name"),
        (["stages=[stage1]", "modl=tiny"], "did you mean model?"),
        (["stages=[stage1]", "dry=perhaps"], "dry=perhaps"),
        (["stages=[stage1,stage2]", "stage2:model.max_tiles=3"], "stage2: model differs"),
        (["stages=[stage1]", "run=a/b"], "plain directory name"),
        (["stages=[stage1]", "parallel.world_size=4096", "stage.global_batch_size=16384"], "many"),
    ],
)
def test_bad_command_lines(
    world: World, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert world.submit(*arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and world.ran() == []


def test_what_is_missing_is_named_with_its_remedy(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.run / "import" / "DONE.json").unlink()
    (world.root / "shards" / "captions").rmdir()
    (world.root / "tokenizer").rmdir()
    assert world.submit("stages=[stage1]") == 1
    said = capsys.readouterr().err
    assert "`make import`" in said and "`make shards`" in said and "data.tokenizer" in said
    assert world.submit("stages=[stage2]") == 1
    assert "run stage1 first" in capsys.readouterr().err
    assert world.submit("stages=[stage2]", f"init_from={world.root}") == 1
    assert "init_from" in capsys.readouterr().err


def test_a_begun_stage_keeps_its_recipe_but_not_its_layout(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.submit("stages=[stage1]") == 0
    assert world.submit("stages=[stage1]", "stage.lr.connector=0.5", "stage.seed=7") == 1
    said = capsys.readouterr().err
    assert "stage.lr.connector: 0.002 -> 0.5" in said and "stage.seed: 1234 -> 7" in said
    assert world.submit("stages=[stage1]", "parallel=tp2", "stage.log_every=3") == 0
    # A stage that has not begun may be changed freely.
    assert world.submit("stages=[stage1,stage2]", "stage2:stage.seed=7") == 0
    assert RunDirectory(world.run).recorded()["stage2"].stage.seed == 7


def test_damaged_records_are_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.submit("stages=[stage1]") == 0
    (world.run / "stage1" / "DONE.json").write_text("{")
    assert world.submit("stages=[stage1]") == 1
    assert "DONE.json is not JSON" in capsys.readouterr().err
    (world.run / "config.yaml").write_text("stage1: {nonsense: 1}\n")
    assert world.submit("stages=[stage1]") == 1
    assert "config.yaml, stage1: nonsense" in capsys.readouterr().err


def test_a_run_in_use_is_left_alone(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(world.run).locked():
        assert world.submit("stages=[stage1]") == 1
    assert "is in use by process" in capsys.readouterr().err
    assert world.submit("stages=[stage1]") == 0


def test_changed_code_is_kept_beside(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "models").mkdir(parents=True)
    (source / "models" / "one.py").write_text("1\n")
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", source)
    assert world.submit("stages=[stage1]") == 0
    assert world.submit("stages=[stage1]") == 0
    assert [*world.run.glob("code-*")] == []
    (source / "models" / "one.py").write_text("2\n")
    assert world.submit("stages=[stage1]") == 0
    assert (world.run / "code" / "models" / "one.py").read_text() == "2\n"
    (older,) = world.run.glob("code-*")
    assert (older / "models" / "one.py").read_text() == "1\n"


def test_dry_run_prints_everything_and_writes_nothing(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "shards" / "captions").rmdir()
    before = sorted(world.root.rglob("*"))
    assert world.submit(ALL, "stage3:parallel=tp2", "dry=1") == 0
    said = capsys.readouterr().out
    assert said.count("--config") == 3 and "WORLD_SIZE=2" in said
    steps = compose(["stage=stage3"]).stage.steps
    assert f"stage3: would run, {steps} steps of 8 packs of 512 tokens, tiny, 2 processes" in said
    assert "not there yet: stage1 needs the shards" in said
    assert sorted(world.root.rglob("*")) == before


def test_this_machine_leaves_the_same_records_as_a_cluster(world: World) -> None:
    (world.run / "fail_stage1").touch()
    assert world.submit("stages=[stage1]") == 1
    (world.run / "fail_stage1").unlink()
    assert world.submit("stages=[stage1]", "cluster.hours=2", "cluster.stop_minutes=30") == 0
    lines = (world.run / "stage1" / "attempts.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "end", "start", "end"]
    assert [event.get("outcome") for event in events] == [None, "failed", None, "done"]
    assert [event["segment"] for event in events if event["event"] == "start"] == ["001", "002"]
    environment = json.loads((world.run / "environment").read_text())
    assert environment["PYTHONPATH"] == str(world.run / "code")
    assert environment["PYTHONSAFEPATH"] == "1" and environment["STOP_AFTER_SECONDS"] == "5400"
    assert environment["ATTEMPT_ID"] == events[-1]["attempt"]


def test_a_crash_loop_is_told_and_tried_again(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    (world.run / "fail_stage1").touch()
    for _ in range(4):  # the first makes a step
        assert world.submit("stages=[stage1]") == 1
    assert "stage1: had failed before, see" in capfd.readouterr().out
    (world.run / "fail_stage1").unlink()
    assert world.submit("stages=[stage1]") == 0
    assert (world.run / "stage1" / "FAILED-1.json").exists()


def test_a_stop_file_holds_this_machine_too(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.run / "stage1").mkdir()
    (world.run / "stage1" / "STOP").touch()
    assert world.submit("stages=[stage1]") == 1
    said = capsys.readouterr().err
    assert "remove the file to go on" in said and said.count("\n") == 1 and world.ran() == []


def test_an_export_ends_the_pipeline(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy_code.write(world.root / "source")
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", source)
    assert world.submit(ALL, "export=true") == 0
    assert (world.run / "hf").is_dir() and (world.run / "export" / "001" / "log.out").exists()
    assert world.submit(ALL, "export=true") == 0
    assert not (world.run / "export" / "002").exists()
    (source / "tools" / "hf_export.py").write_text("raise SystemExit('error: no room')")
    (world.run / "hf").rmdir()
    capsys.readouterr()
    (world.run / "stage3" / "DONE.json").unlink()  # so that the new code is taken
    assert world.submit(ALL, "export=true") == 1
    said = capsys.readouterr().err
    assert "export: error: no room" in said and "export/002/log.out" in said


def test_a_stage_whose_checkpoint_is_torn_is_not_built_upon(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE + "manifest.write_text('torn')\n")
    assert world.submit("stages=[stage1,stage2]") == 1
    assert "MANIFEST.json is not the one that" in capsys.readouterr().err
    assert world.ran() == ["stage1"]


SLURM = ["cluster=slurm", "parallel=dp2", "cluster.detect=false", "stage.gpu_hours=null"]


def no_slurm(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    (root / "empty").mkdir()
    monkeypatch.setenv("PATH", str(root / "empty"))


def test_scripts_are_written_without_slurm(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_slurm(monkeypatch, world.root)
    (world.root / "tokenizer").rmdir()
    assert world.submit(ALL, *SLURM, "dry=1", "export=true") == 0
    said = capsys.readouterr().out
    scripts = sorted(path.relative_to(world.run) for path in world.run.rglob("submit.sh"))
    assert [str(path.parent) for path in scripts] == [
        "export/001",
        *(
            f"{stage}/{part}"
            for stage in ("stage1", "stage2", "stage3")
            for part in ("segments/001", "segments/002", "verify/001")
        ),
    ]
    assert all(str(path) in said for path in scripts) and "nothing is queued" in said
    assert "not there yet: stage1 needs the tokenizer" in said
    text = (world.run / "stage2" / "segments" / "001" / "submit.sh").read_text()
    assert "# begins when test.stage1.verify.001 has succeeded" in text
    assert "--dependency" not in text  # no job has an id yet
    assert (world.run / "code" / "slurm" / "submit.py").exists()
    assert load(world.run / "stage2" / "config.yaml").cluster.name == "slurm"
    # Once more: the same files, not the next numbers.
    assert world.submit(ALL, *SLURM, "dry=1", "export=true") == 0
    assert len(list(world.run.rglob("submit.sh"))) == 10


def test_looking_does_not_change_what_queued_jobs_run(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeSlurm(tmp_path / "fake", monkeypatch)
    assert world.submit("stages=[stage1]", *SLURM) == 0
    before = (world.run / "stage1" / "config.yaml").read_text()
    plan = (world.run / "plan.json").read_text()
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", toy_code.write(tmp_path / "source"))
    assert world.submit("stages=[stage1]", *SLURM, "cluster.hours=3", "dry=1") == 0
    assert (world.run / "stage1" / "config.yaml").read_text() == before
    assert (world.run / "plan.json").read_text() == plan


def test_a_machine_without_slurm_is_told_so(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_slurm(monkeypatch, world.root)
    for words in (SLURM, ["cluster=slurm"]):
        assert world.submit("stages=[stage1]", *words) == 1
        said = capsys.readouterr().err
        assert "not on PATH" in said and said.count("\n") == 1
    assert not (world.run / "stage1").exists()


def test_a_run_directory_that_cannot_be_written(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.root / "file").touch()
    for words in ([], [*SLURM, "dry=1"]):
        assert world.submit("stages=[stage1]", f"runs_dir={world.root / 'file'}", *words) == 1
        said = capsys.readouterr().err
        assert str(world.root / "file") in said and said.count("\n") == 1


def test_a_pipeline_is_queued_in_less_than_two_seconds_without_torch(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeSlurm(tmp_path / "fake", monkeypatch)
    code = (
        "import sys; from slurm.submit import main; code = main(sys.argv[1:]); "
        "heavy = [m for m in ('torch', 'megatron', 'transformers') if m in sys.modules]; "
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [*world.base, ALL, *SLURM, "export=true", "yes=true"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert len(fake.queue()) == 10
    # Time of the processor, for the tests share it with others.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
