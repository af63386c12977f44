"""What a submission says before anything is queued, and the confirmation of large plans."""

import builtins
import io
import sys
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema.errors import ConfigError
from slurm.chain import LiveJobs, chain
from slurm.plan import as_json, confirm, hours, job_lines, plan, table
from slurm.run_directory import RunDirectory

BASE = ["cluster=mn5", "cluster.account=a", "cluster.qos=acc_ehpc", "parallel=h100_8", "run=r"]
BASE += ["stage.gpu_hours=160", "cluster.hours=12", "cluster.stop_minutes=60"]


def test_the_table_counts_nodes_hours_and_the_sites_own_unit(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    configs = {stage: compose([*BASE, f"stage={stage}"]) for stage in ("stage1", "stage2")}
    stages = plan(run, configs)
    # 160 GPU-hours on 8 GPUs: 20 h, in segments of 11 h of training.
    assert [(s.segments, s.spare_segments, s.nodes) for s in stages] == [(2, 1, 2)] * 2
    assert hours(stages) == (320.0, 2 * 3 * 12 * 8.0)
    text = table(stages, configs["stage1"])
    assert "GPU-hours: 320.0 expected, 576.0 at most (6,400 core-hours; 11,520 core-hours" in text
    assert "2 x 4" in text and "2 + 1 spare" in text and "20.0 h" in text
    stored = as_json(run, stages)
    assert [stage["name"] for stage in stored["stages"]] == ["stage1", "stage2"]
    assert stored["stages"][0]["gpu_hours"] == 160.0 and stored["stages"][0]["state"] == "run"


def test_a_stage_of_an_earlier_plan_stays_in_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    run.root.mkdir()
    first = {"stage1": compose([*BASE, "stage=stage1"])}
    run.record(first, as_json(run, plan(run, first)))
    second = as_json(run, plan(run, {"stage2": compose([*BASE, "stage=stage2"])}))
    assert [stage["name"] for stage in second["stages"]] == ["stage1", "stage2"]


def test_one_line_for_all_segments_of_a_stage(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    configs = {stage: compose([*BASE, f"stage={stage}"]) for stage in ("stage1", "stage2")}
    jobs = chain(run, configs, list(configs), LiveJobs())
    lines = job_lines(jobs)
    assert lines == [
        "  r.stage1.001 to 003: 2 nodes, 12 h, one after the other",
        "  r.stage1.verify.001: 1 node, 0.25 h, when all 3 segments end",
        "  r.stage2.001 to 003: 2 nodes, 12 h, one after the other, when r.stage1.verify.001 "
        "succeeds",
        "  r.stage2.verify.001: 1 node, 0.25 h, when r.stage1.verify.001 succeeds and all 3 "
        "segments end",
    ]
    ids = {job.name: str(100 + number) for number, job in enumerate(jobs)}
    assert job_lines(jobs, ids)[0].startswith("  r.stage1.001 to 003 100 to 102: ")


def test_large_plans_are_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "r")
    configs = {"stage1": compose([*BASE, "cluster.confirm_gpu_hours=100"])}
    stages = plan(run, configs)
    with pytest.raises(ConfigError, match=r"takes 160 GPU-hours, more than .*=100; .*YES=1"):
        confirm(stages, configs["stage1"], False)
    confirm(stages, configs["stage1"], True)
    below = compose([*BASE, "cluster.confirm_gpu_hours=160"])
    confirm(stages, below, False)

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    for answer in ("no", ""):
        monkeypatch.setattr(builtins, "input", lambda _, answer=answer: answer)
        with pytest.raises(ConfigError, match="nothing was submitted"):
            confirm(stages, configs["stage1"], False)
    monkeypatch.setattr(builtins, "input", lambda _: "Y")
    confirm(stages, configs["stage1"], False)


def test_an_unknown_length_is_confirmed_by_its_most(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    config = compose([*BASE, "stage.gpu_hours=null", "cluster.confirm_gpu_hours=190"])
    stages = plan(run, {"stage1": config})
    assert hours(stages) == (None, 2 * 12 * 8.0)  # one segment and a spare
    with pytest.raises(ConfigError, match="takes 192 GPU-hours"):
        confirm(stages, config, False)
    assert "unknown expected" in table(stages, config)
