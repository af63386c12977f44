"""The submit command with a fake training program: order, resuming, refusing, recording."""

import json
import sys
from pathlib import Path

import pytest

from conf.compose import compose, load
from slurm import local
from slurm.run_directory import RunDirectory
from slurm.submit import main

# Does what a stage does to a run directory: fails when told to, else one checkpoint and the end.
FAKE = """
import hashlib, json, pathlib, sys
config = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
stage = config.parent
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
