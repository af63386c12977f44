"""A node that preflight finds bad, on a real Slurm: the next segment runs on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slurm import exclude
from tests.slurm import toy_code
from tests.slurm.test_submit_slurm import SlurmWorld
from tests.slurm.throwaway import ThrowAwaySlurm

pytestmark = pytest.mark.slurm

# The real report, without torch; a file of the run says which node is bad.
PREFLIGHT = """
import pathlib, sys, time
from pipeline.preflight_report import PASSED, Problem, RankReport
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
report = RankReport.of_environment(pathlib.Path(words["--report"]))
report.write()
if report.node in (pathlib.Path(words["--config"]).parents[1] / "bad").read_text().split():
    report.failed(Problem("no GPU that torch can use", node_fault=True))
    report.tell()
    sys.exit(1)
time.sleep(1)
report.passed(PASSED)
"""


@pytest.fixture
def world(tmp_path: Path, slurm: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch) -> SlurmWorld:
    source = toy_code.write(tmp_path / "source")
    (source / "pipeline" / "preflight.py").write_text(PREFLIGHT)
    (source / "data_shards").mkdir()
    for name, copy in {
        "pipeline/preflight/report.py": "pipeline/preflight_report.py",
        "pipeline/files.py": "pipeline/files.py",
        "data_shards/durable.py": "data_shards/durable.py",
    }.items():
        shutil.copyfile(toy_code.REPOSITORY / name, source / copy)
    (source / "data_shards" / "__init__.py").touch()
    monkeypatch.setattr("slurm.run_directory.REPOSITORY", source)
    return SlurmWorld(tmp_path, slurm)


def test_the_next_segment_avoids_it(world: SlurmWorld) -> None:
    (world.run / "bad").write_text("cpu2")
    assert world.submit("stages=[stage1,stage2]") == 0
    ids = world.ids()
    world.wait_for_all()
    states = world.states()
    assert states["test.stage1.001"] == "FAILED"
    assert states["test.stage1.002"] == states["test.stage1.verify.001"] == "COMPLETED"
    assert states["test.stage2.001"] == "COMPLETED"
    assert exclude.read(world.run) == ["cpu2"]
    entry = exclude.entries(world.run)["cpu2"]
    assert (entry["reason"], entry["job"]) == ("no GPU that torch can use", ids["test.stage1.001"])
    for name in ("test.stage1.002", "test.stage2.001", "test.stage2.verify.001"):
        job = world.slurm.job(ids[name])
        assert job["ExcNodeList"] == "cpu2"
        assert "cpu2" not in job["NodeList"]
    lines = (world.run / "stage1" / "attempts.jsonl").read_text().splitlines()
    outcomes = [json.loads(line).get("outcome") for line in lines]
    assert [outcome for outcome in outcomes if outcome] == ["bad_node", "done"]
    # Later submissions avoid it as well.
    (world.run / "stage2" / "DONE.json").unlink()
    assert world.submit("stages=[stage2]") == 0
    later = next(job for name, job in world.ids().items() if name not in ids)
    assert world.slurm.job(later)["ExcNodeList"] == "cpu2"
    world.wait_for_all()
