"""What will happen and what it costs: plan.json, the table of a submission, the confirmation."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import PLAN
from slurm import local
from slurm.chain import planned_segments
from slurm.estimate import Estimate, estimate
from slurm.job import Job
from slurm.render import shape
from slurm.run_directory import RunDirectory


@dataclass(frozen=True)
class StagePlan:
    """One stage of plan.json."""

    name: str
    state: str  # done, queued, resume, run
    config: str
    ranks: int
    cluster: str
    steps: int | None
    epochs: float | None
    command: list[str]
    nodes: int = 1
    ranks_per_node: int = 1
    hours: float | None = None  # walltime of a segment; None: no limit
    expected_hours: float | None = None  # of the whole stage; None: not known
    estimate: str = "unknown"  # or planned, measured
    segments: int = 1
    spare_segments: int = 0
    gpu_hours: float | None = None  # expected; without GPUs, rank-hours
    gpu_hours_at_most: float | None = None


def plan(
    run: RunDirectory, configs: Mapping[str, Config], queued: Sequence[str] = ()
) -> list[StagePlan]:
    """Every stage of the submission; `queued` are those whose jobs are in the queue already."""
    return [_stage(run, stage, config, stage in queued) for stage, config in configs.items()]


def as_json(run: RunDirectory, stages: Sequence[StagePlan]) -> dict[str, Any]:
    """The plan.json of the run, but for the digest of its code.

    Stages that this submission does not name stay as they were planned.
    """
    values = {stage["name"]: stage for stage in _planned_before(run)}
    values |= {stage.name: asdict(stage) for stage in stages}
    return {"format": 1, "run": run.root.name, "stages": [values[name] for name in sorted(values)]}


def _planned_before(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        stages = json.loads((run.root / PLAN).read_text(encoding="utf-8"))["stages"]
        return [dict(stage) for stage in stages if "name" in stage]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # none yet, or made anew now


def _stage(run: RunDirectory, stage: str, config: Config, queued: bool) -> StagePlan:
    cluster = config.cluster
    done, begun = run.is_done(stage), run.has_begun(stage)
    nodes, ranks_per_node, _ = shape(config)
    expected = Estimate(0.0, 0) if done else estimate(config, run.stage(stage))
    segments, spare = (0, 0) if done else planned_segments(config, run.stage(stage))
    limited = cluster.hours != float("inf")
    gpus = _billed(config)
    return StagePlan(
        name=stage,
        state="done" if done else "queued" if queued else "resume" if begun else "run",
        config=f"{stage}/config.yaml",
        ranks=config.parallel.world_size,
        cluster=cluster.name,
        steps=config.stage.steps,
        epochs=config.stage.epochs,
        command=local.command(run.config_path(stage)),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        hours=cluster.hours if limited else None,
        expected_hours=expected.hours,
        estimate=expected.source,
        segments=segments,
        spare_segments=spare,
        gpu_hours=None if expected.hours is None else expected.hours * gpus,
        gpu_hours_at_most=(segments + spare) * cluster.hours * gpus if limited else None,
    )


def _billed(config: Config) -> int:
    """GPUs that a segment occupies; on nodes without GPUs, its ranks."""
    cluster, (nodes, ranks_per_node, _) = config.cluster, shape(config)
    if not cluster.gpus_per_node:
        return config.parallel.world_size
    return nodes * (cluster.gpus_per_node if cluster.exclusive else ranks_per_node)


def table(stages: Sequence[StagePlan], config: Config) -> str:
    """What is queued and what it costs, as text for a terminal."""
    head = ("stage", "state", "nodes x ranks", "expected", "walltime", "segments", _unit(config))
    rows = [head, *(_row(stage) for stage in stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, total(stages, config)])


def total(stages: Sequence[StagePlan], config: Config) -> str:
    """One line: the hours of all that is not done, in the site's unit too."""
    expected, most = hours(stages)
    known = "unknown" if expected is None else f"{expected:,.1f}"
    line = f"{_unit(config)}: {known} expected, {most:,.1f} at most"
    site = config.cluster.site
    if site.cost_unit != "GPU-hours" and config.cluster.gpus_per_node:
        at_most = f"{most * site.cost_per_gpu_hour:,.0f} {site.cost_unit} at most"
        if expected is None:
            return f"{line} ({at_most})"
        return f"{line} ({expected * site.cost_per_gpu_hour:,.0f} {site.cost_unit}; {at_most})"
    return line


def hours(stages: Sequence[StagePlan]) -> tuple[float | None, float]:
    """GPU-hours expected (None where a stage's are unknown) and at most, of what is to be queued"""
    due = [stage for stage in stages if stage.state in ("run", "resume")]
    expected = [stage.gpu_hours for stage in due]
    most = sum(stage.gpu_hours_at_most or 0.0 for stage in due)
    if any(value is None for value in expected):
        return None, most
    return sum(value or 0.0 for value in expected), most


def confirm(stages: Sequence[StagePlan], config: Config, yes: bool) -> None:
    """Ask before a plan above `cluster.confirm_gpu_hours`; ConfigError unless it is confirmed."""
    expected, most = hours(stages)
    cost, limit = most if expected is None else expected, config.cluster.confirm_gpu_hours
    if yes or cost <= limit:
        return
    what = (
        f"this plan takes {cost:,.0f} {_unit(config)}, more than "
        f"cluster.confirm_gpu_hours={limit:g}"
    )
    if not sys.stdin.isatty():
        raise ConfigError(f"{what}; confirm it with YES=1 (yes=true)")
    try:
        answer = input(f"{what}. Queue it? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed; nothing was submitted")


def job_lines(jobs: Sequence[Job], ids: Mapping[str, str] | None = None) -> list[str]:
    """What is queued, a line for each job, one for all segments of a stage."""
    lines = []
    for _, group in groupby(jobs, key=lambda job: (job.stage, job.kind)):
        these = list(group)
        first, last = these[0], these[-1]
        name = first.name if len(these) == 1 else f"{first.name} to {last.number:03d}"
        number = ""
        if ids is not None:
            number = f" {ids[first.name]}" + (f" to {ids[last.name]}" if len(these) > 1 else "")
        nodes = f"{first.nodes} node{'s' if first.nodes > 1 else ''}"
        follow = ", one after the other" if len(these) > 1 else ""
        lines.append(f"  {name}{number}: {nodes}, {first.hours:g} h{follow}{_waits(first)}")
    return lines


def _waits(job: Job) -> str:
    waits = [f"{name} succeeds" for name in job.after_ok]
    ends = job.after_any
    if ends:
        waits.append(f"{ends[0]} ends" if len(ends) == 1 else f"all {len(ends)} segments end")
    return f", when {' and '.join(waits)}" if waits else ""


def _row(stage: StagePlan) -> tuple[str, ...]:
    if stage.state == "done":
        return (stage.name, stage.state, "", "", "", "", "")
    expected = "unknown" if stage.expected_hours is None else _duration(stage.expected_hours)
    if stage.estimate == "measured":
        expected += " (measured)"
    most = "" if stage.gpu_hours_at_most is None else f"<= {stage.gpu_hours_at_most:,.1f}"
    gpu_hours = "unknown" if stage.gpu_hours is None else f"{stage.gpu_hours:,.1f}"
    return (
        stage.name,
        stage.state,
        f"{stage.nodes} x {stage.ranks_per_node}",
        expected,
        "none" if stage.hours is None else _duration(stage.hours),
        f"{stage.segments} + {stage.spare_segments} spare",
        f"{gpu_hours} ({most})" if most else gpu_hours,
    )


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 2 else f"{max(1, round(hours * 60))} min"


def _unit(config: Config) -> str:
    return "GPU-hours" if config.cluster.gpus_per_node else "rank-hours"
