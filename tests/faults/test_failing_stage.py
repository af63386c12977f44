"""A stage that cannot succeed ends at once, with all that waits for it, and status says why."""

import json
import time
from pathlib import Path

import pytest

from tests.faults.pipeline_run import PipelineRun
from tests.faults.world import World
from tests.slurm.throwaway import ThrowAwaySlurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_shards_that_vanish_after_submission(slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    run = PipelineRun(World(tmp_path / "world"), "failing", slurm)
    run.submit()
    shards = list((run.shards / "captions" / "shards").iterdir())
    assert shards
    for path in shards:
        path.unlink()

    failed = run.root / "stage1" / "FAILED.json"
    run.until(failed.exists, "FAILED.json")
    end = time.monotonic() + 30
    while run.alive():
        assert time.monotonic() < end, f"successors are not cancelled\n{run.explain()}"
        time.sleep(0.1)
    states = {name.removeprefix("failing."): state for state, name in run.jobs().values()}
    assert states.pop("stage1.001") == "FAILED" and states.pop("stage1.verify.001") == "FAILED"
    assert set(states.values()) == {"CANCELLED"}, run.explain()

    # Two attempts without a step, in one job, and no third.
    assert run.attempts("stage1") == 2
    reason = json.loads(failed.read_text())["reason"]
    assert "captions" in reason, reason
    words = [f"run={run.name}", f"runs_dir={run.root.parent}", "refresh=true"]
    told = " ".join(run.command("slurm.status", *words, check=False).split())
    assert "captions" in told and "stage1" in told, told
