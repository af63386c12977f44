"""`make profile`: traces that a viewer opens, tables, and a run that is as it was."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.callbacks.profile import Steps
from tests.distributed import run_ranks
from tests.pipeline.small_run import SmallRun, write_config
from tools import profile_rank, profile_run
from tools.command import run


def tree(directory: Path) -> dict[str, str]:
    """Digests of all files but the profile's."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and profile_rank.PROFILE not in path.relative_to(directory).parts
    }


def events(trace: Path) -> Counter[str]:
    """How often each name stands in a trace."""
    with gzip.open(trace, "rt") as file:
        return Counter(event.get("name") for event in json.load(file)["traceEvents"])


def test_two_ranks_of_a_started_stage(
    small_run: SmallRun, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_run.config("stage1", "parallel=dp2", run="profiled")
    write_config(config)
    root = small_run.root / "profiled"
    (root / "stage1" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = tree(root)
    words = ["run=profiled", "stage=stage1", f"runs_dir={small_run.root}", "model=tiny"]
    assert run(profile_run.main, [*words, "wait=1", "warmup=0", "active=2"]) == 0
    assert tree(root) == before
    folder = root / "profile" / "stage1"
    for rank in (0, 1):
        found = events(folder / f"rank_{rank}.trace.json.gz")
        # Two steps of two micro-batches; the step that was waited for is not there.
        assert found["forward-compute"] == found["backward-compute"] == 4
        assert found["all-grads-sync"] == 2
        assert any("attention" in name for name in found if name)
        assert "aten::mm" in (folder / f"rank_{rank}.txt").read_text()
    assert not list(folder.glob(".partial*")) and not (folder / "DONE.json").exists()
    shown = capfd.readouterr().out
    assert "step 3/3" in shown and "perfetto" in shown and "Self CPU" in shown


def _profile(config: Any, words: dict[str, str]) -> None:
    profile_rank.profile(config, words)


def test_a_preference_stage_needs_neither_its_predecessor_nor_the_reference_pass(
    small_run: SmallRun,
) -> None:
    config = small_run.config("stage3", run="unborn")
    run_ranks(1, _profile, config, {"warmup": "0", "active": "1"})
    root = small_run.root / "unborn"
    assert tree(root) == {}
    assert events(root / "profile/stage3/rank_0.trace.json.gz")["forward-backward"] == 1


def test_what_cannot_be_profiled_is_named(
    small_run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str) -> str:
        assert run(profile_run.main, ["run=none", *words]) == 1
        return capsys.readouterr().err

    assert "usage" in error()
    base = ["stage=stage1", f"runs_dir={small_run.root}", "parallel=dp2"]
    assert "ranks=2 is neither" in error(*base, "ranks=2")
    assert "ranks=a is neither" in error(*base, "ranks=a")
    assert not (small_run.root / "none").exists()
    config = small_run.config("stage1")
    with pytest.raises(ValueError, match="active=many is no number"):
        profile_rank.profile(config, {"active": "many"})
    with pytest.raises(ValueError, match="active at least 1"):
        profile_rank.profile(config, {"active": "0"})
    assert Steps(2, 3, 4).total == 9
    with pytest.raises(ValueError, match="at least 0"):
        replace(Steps(), wait=-1).check()


def test_on_a_cluster_the_srun_line_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run=r", "stage=stage2", "model=amalia_vl_9b", "data=amalia", "cluster=mn5"]
    assert run(profile_run.main, [*words, f"runs_dir={tmp_path}", "active=1", "ranks=0"]) == 0
    shown = capsys.readouterr().out
    assert "srun --nodes=" in shown and "MASTER_ADDR" in shown
    assert "-m tools.profile_rank --config" in shown and "active=1 ranks=0" in shown
    assert (tmp_path / "r/profile/stage2/config.yaml").is_file()
