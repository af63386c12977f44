"""Which jobs a pipeline becomes, and what each waits for."""

import json
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.cluster import QueueConfig
from conf.schema.errors import ConfigError
from slurm.chain import LiveJobs, chain
from slurm.estimate import estimate
from slurm.job import Job
from slurm.run_directory import RunDirectory

STAGES = ("stage1", "stage2", "stage3")


def configs(root: Path, *overrides: str, stages: tuple[str, ...] = STAGES) -> dict[str, Config]:
    base = ["cluster=slurm", f"runs_dir={root}", "run=r", "parallel=dp2", "cluster.hours=2"]
    base += ["cluster.stop_minutes=30", "stage.gpu_hours=null", *overrides]
    return {stage: compose([*base, f"stage={stage}"]) for stage in stages}


def jobs_of(
    root: Path,
    *overrides: str,
    live: LiveJobs | None = None,
    stages: tuple[str, ...] = STAGES,
    export: bool = False,
) -> dict[str, Job]:
    some = configs(root, *overrides, stages=stages)
    found = chain(RunDirectory(root / "r"), some, stages, live or LiveJobs(), export)
    return {job.name: job for job in found}


def test_three_stages_and_an_export_are_one_chain(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, export=True)
    assert list(jobs) == [
        "r.stage1.001",
        "r.stage1.002",
        "r.stage1.verify.001",
        "r.stage2.001",
        "r.stage2.002",
        "r.stage2.verify.001",
        "r.stage3.001",
        "r.stage3.002",
        "r.stage3.verify.001",
        "r.export.001",
    ]
    first, spare, verify = (jobs[f"r.stage2.{name}"] for name in ("001", "002", "verify.001"))
    assert jobs["r.stage1.001"].after_ok == jobs["r.stage1.001"].after_any == ()
    assert first.after_ok == ("r.stage1.verify.001",) and first.after_any == ()
    # A cancelled first segment must not let the second begin before stage 1 is verified.
    assert spare.after_ok == first.after_ok and spare.after_any == ("r.stage2.001",)
    assert verify.after_any == ("r.stage2.001", "r.stage2.002")
    assert verify.after_ok == ("r.stage1.verify.001",)
    assert jobs["r.export.001"].after_ok == ("r.stage3.verify.001",)
    assert first.directory == tmp_path / "r" / "stage2" / "segments" / "001"
    assert all(job.directory.is_absolute() for job in jobs.values())
    assert not list(tmp_path.iterdir())  # pure


@pytest.mark.parametrize(
    ("gpu_hours", "segments"),
    [(2.9, 1), (3.0, 1), (3.1, 2), (6.0, 2), (30.0, 10)],  # 2 ranks, 1.5 h of training a segment
)
def test_a_long_stage_is_several_segments(tmp_path: Path, gpu_hours: float, segments: int) -> None:
    words = [f"stage.gpu_hours={gpu_hours}", "cluster.spare_segments=2"]
    jobs = jobs_of(tmp_path, *words, stages=("stage1",))
    numbers = [job.number for job in jobs.values() if job.kind == "segment"]
    assert numbers == list(range(1, segments + 3))
    for number in numbers[1:]:
        assert jobs[f"r.stage1.{number:03d}"].after_any == (f"r.stage1.{number - 1:03d}",)
    assert len(jobs["r.stage1.verify.001"].after_any) == segments + 2


def test_an_estimate_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage1 would take 2000 segments .* stage.gpu_hours"):
        jobs_of(tmp_path, "stage.gpu_hours=6000")


def test_a_begun_stage_is_measured(tmp_path: Path) -> None:
    stage = tmp_path / "r" / "stage1"
    stage.mkdir(parents=True)
    config = configs(tmp_path, "stage.steps=1000", "stage.epochs=null", stages=("stage1",))
    # A slow first step, a line cut by a kill, nonsense: none of them counts.
    lines = [{"step": 1, "seconds": 500.0}]
    lines += [{"step": step, "seconds": 30.0} for step in range(2, 41)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n[]\n{"step": 41, "sec'
    (stage / "metrics.jsonl").write_text(text)
    found = estimate(config["stage1"], stage)
    assert found.measured and found.hours == pytest.approx(960 * 30 / 3600)
    assert found.segments == 6  # 8 h in segments of 1.5
    jobs = jobs_of(tmp_path, "stage.steps=1000", "stage.epochs=null", stages=("stage1",))
    assert sum(job.kind == "segment" for job in jobs.values()) == 7


def test_what_is_done_or_queued_is_not_queued_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r")
    some = configs(tmp_path)
    live = LiveJobs(segments={"stage2": ("21",)}, verifiers={"stage2": "22"})
    jobs = {job.name: job for job in chain(run, some, ["stage2", "stage3"], live, True)}
    assert {job.stage for job in jobs.values()} == {"stage3"}
    assert jobs["r.stage3.001"].after_ok == ("22",)
    live = LiveJobs({}, {"stage3": "33"}, export="34")
    assert chain(run, some, ["stage3"], live, True) == []
    # Of a later submission: stage 3 alone waits for the stage 2 that is queued.
    live = LiveJobs(verifiers={"stage2": "22"})
    alone = chain(run, configs(tmp_path, stages=("stage3",)), ["stage3"], live)
    assert alone[0].after_ok == ("22",)


def test_a_stage_that_lost_its_verifier_keeps_its_queued_segments(tmp_path: Path) -> None:
    live = LiveJobs(segments={"stage1": ("11",)})
    jobs = jobs_of(tmp_path, live=live, stages=("stage1",))
    assert [job.kind for job in jobs.values()] == ["segment", "verify"]
    assert jobs["r.stage1.001"].after_any == ("11",)
    assert jobs["r.stage1.verify.001"].after_any == ("11", "r.stage1.001")


def test_numbers_go_on_but_scripts_that_were_never_submitted_are_written_again(
    tmp_path: Path,
) -> None:
    for number, files in {"001": ["submit.sh", "job.json"], "002": ["submit.sh"]}.items():
        directory = tmp_path / "r" / "stage1" / "segments" / number
        directory.mkdir(parents=True)
        for name in files:
            (directory / name).touch()
    assert "r.stage1.002" in jobs_of(tmp_path, stages=("stage1",))
    (tmp_path / "r" / "stage1" / "segments" / "002" / "log.out").touch()
    assert "r.stage1.003" in jobs_of(tmp_path, stages=("stage1",))


def test_a_number_whose_job_is_queued_is_taken_though_its_record_was_lost(tmp_path: Path) -> None:
    directory = tmp_path / "r" / "stage1" / "segments" / "001"
    directory.mkdir(parents=True)
    (directory / "submit.sh").touch()
    live = LiveJobs({"stage1": ("7",)}, names=["r.stage1.001", "r.stage1.verify.009", "r.x"])
    assert "r.stage1.002" in jobs_of(tmp_path, live=live, stages=("stage1",))
    assert "r.stage1.verify.010" in jobs_of(tmp_path, live=live, stages=("stage1",))


def test_an_export_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "r" / "hf").mkdir(parents=True)
    assert "r.export.001" not in jobs_of(tmp_path, export=True)
    # That of another stage has a place of its own.
    export = jobs_of(tmp_path, export=True, stages=("stage1",))["r.export.001"]
    assert "/r/stage1/hf" in export.body


def test_a_queue_of_one_job_gets_one_job(tmp_path: Path) -> None:
    words = ["cluster.qos=debug", "cluster.spare_segments=0"]
    some = configs(tmp_path, *words, stages=("stage1",))
    some["stage1"].cluster.site.queues["debug"] = QueueConfig(hours=2, submitted=1)
    run = RunDirectory(tmp_path / "r")
    assert [job.kind for job in chain(run, some, ["stage1"], LiveJobs())] == ["segment"]
    assert len(chain(run, some, ["stage1"], LiveJobs(), True)) == 3


def test_shapes(tmp_path: Path) -> None:
    words = ["cluster=mn5", "cluster.account=a", "cluster.qos=acc_ehpc", "parallel.world_size=6"]
    jobs = jobs_of(tmp_path, *words, "cluster.hours=12", stages=("stage1",), export=True)
    segment = jobs["r.stage1.001"]
    assert (segment.nodes, segment.ranks_per_node, segment.gpus_per_node) == (2, 3, 4)
    assert segment.exclusive and segment.cpus_per_rank == 26  # of 80 cores
    verify = jobs["r.stage1.verify.001"]
    assert (verify.nodes, verify.gpus_per_node, verify.cpus_per_rank) == (1, 1, 20)
    assert not verify.exclusive and verify.hours == 0.25
    export = jobs["r.export.001"]
    assert (export.nodes, export.gpus_per_node, export.cpus_per_rank) == (1, 4, 80)
    shared = jobs_of(tmp_path, *words, "cluster.exclusive=false", stages=("stage1",))
    segment = shared["r.stage1.001"]
    assert (segment.gpus_per_node, segment.cpus_per_rank) == (3, 20) and not segment.exclusive
