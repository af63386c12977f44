"""The state of a run: its stages, jobs and arrays, what they have used and what is left."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from slurm import exclude
from slurm.array_state import ArrayState, array_states
from slurm.job import FOLDERS, RECORD, JobRecord, read_record
from slurm.job_state import JobState, job_states
from slurm.queue_look import QueueLook, look
from slurm.stage_state import StageState, ended_at
from slurm.stage_state import read as read_stage
from slurm.verify import STOP


@dataclass(frozen=True)
class StageSummary:
    """A stage, its jobs taken into account. Hours are of GPUs, without GPUs of ranks."""

    files: StageState
    state: str  # done, failed, stopped, running, queued, paused, not begun
    segment: JobState | None  # the one that runs, else the next, else the newest
    segments: int  # planned or made so far
    hours_used: float
    hours_left: float | None


@dataclass(frozen=True)
class RunState:
    """Everything that `slurm.status` shows."""

    root: Path
    stages: tuple[StageSummary, ...]
    jobs: tuple[JobState, ...]
    arrays: tuple[ArrayState, ...]
    look: QueueLook | None  # None: the run has nothing to do with Slurm
    unit: str  # GPU-hours or rank-hours
    other_hours_used: float  # of verifiers, export and arrays
    cost: tuple[str, float] | None  # the site's own unit, and how many make an hour of a GPU
    stop_files: tuple[str, ...]
    excluded: Mapping[str, str]  # node -> reason
    export: str  # the Hugging Face folder, once it is there
    problems: tuple[str, ...]


def run_state(root: Path, refresh: bool = False, ask: bool = True) -> RunState:
    """Read the run in `root`, and ask Slurm unless `ask` is false or nothing of it is Slurm's."""
    records, problems = readable_records(root)
    plan = _plan(root)
    seen = look(root, records, refresh) if ask and _uses_slurm(plan, records) else None
    files = [read_stage(stage_dir) for stage_dir in _stage_dirs(root, plan)]
    jobs = job_states(records, seen, {stage.name: stage.attempts for stage in files})
    excluded, damage = _excluded(root)
    settings: Mapping[str, Any] = next((s.settings for s in files if s.settings), {})
    gpus = any(_gpus(stage, jobs) for stage in files)
    stages = tuple(
        _summary(root, stage, jobs, seen, plan.get(stage.name, {}), gpus) for stage in files
    )
    return RunState(
        root=root,
        stages=stages,
        jobs=tuple(jobs),
        arrays=tuple(array_states(root, jobs)),
        look=seen,
        unit="GPU-hours" if gpus else "rank-hours",
        other_hours_used=sum(
            (job.gpu_seconds or 0.0) / 3600 for job in jobs if job.kind != "segment"
        ),
        cost=_cost(settings),
        stop_files=tuple(str(root / STOP) for _ in range((root / STOP).exists())),
        excluded=excluded,
        export=str(root / "hf") if (root / "hf").is_dir() else "",
        problems=(*problems, *damage),
    )


def readable_records(root: Path) -> tuple[list[JobRecord], list[str]]:
    """The job.json files of a run, oldest first, and what is wrong with damaged ones."""
    found, problems = [], []
    for path in (path for folder in FOLDERS for path in root.glob(f"{folder}/[0-9]*/{RECORD}")):
        try:
            found.append(read_record(path))
        except (ConfigError, OSError) as error:
            problems.append(str(error))
    return sorted(found, key=lambda record: (record.submitted, record.job_id)), problems


def _summary(
    root: Path,
    stage: StageState,
    jobs: Sequence[JobState],
    seen: QueueLook | None,
    planned: Mapping[str, Any],
    with_gpus: bool,
) -> StageSummary:
    segments = [job for job in jobs if job.kind == "segment" and job.stage == stage.name]
    live = [job for job in segments if job.is_live]
    running = [job for job in live if job.is_running]
    alive = bool(running) or (not segments and runs_here(root, stage))
    name = "not begun"
    if stage.is_done:
        name = "done"
    elif alive:
        name = "running"
    elif stage.failure:
        name = "failed"
    elif (root / STOP).exists() or (root / stage.name / STOP).exists():
        name = "stopped"
    elif live:
        name = "queued"
    elif seen is not None and seen.jobs is None and segments:
        name = "unknown"
    elif stage.has_begun:
        failed = bool(stage.attempts) and stage.attempts[-1].outcome in ("failed", "bad_node")
        name = "failed" if failed else "paused"
    elif any(job.ended_badly for job in segments):
        name = "cancelled"
    return StageSummary(
        files=stage,
        state=name,
        segment=next(iter(running or live or segments[-1:]), None),
        segments=max(len(segments), _whole(planned.get("segments"))),
        hours_used=_hours_used(root / stage.name, stage, segments, alive, with_gpus),
        hours_left=_hours_left(stage, segments, planned, with_gpus),
    )


def _hours_used(
    stage_dir: Path,
    stage: StageState,
    segments: Sequence[JobState],
    alive: bool,
    with_gpus: bool,
) -> float:
    """By Slurm's accounting where it knows the job, else from the attempts."""
    ranks = _ranks(stage)
    accounted = {job.job_id: job for job in segments if job.gpu_seconds is not None}
    seconds = sum(
        (job.gpu_seconds or 0.0) if with_gpus else job.used * ranks for job in accounted.values()
    )
    for number, attempt in enumerate(stage.attempts):
        if attempt.job_id in accounted:
            continue
        is_last = number == len(stage.attempts) - 1
        spent = max(0.0, ended_at(attempt, stage_dir, alive and is_last) - attempt.started)
        seconds += spent * (attempt.gpus if with_gpus else ranks)
    return seconds / 3600


def _hours_left(
    stage: StageState,
    segments: Sequence[JobState],
    planned: Mapping[str, Any],
    with_gpus: bool,
) -> float | None:
    """Steps left times the median step, else what was planned; None where nothing is known."""
    if stage.is_done:
        return 0.0
    width = _gpus(stage, segments) if with_gpus else _ranks(stage)
    if stage.step_seconds is not None and stage.steps is not None:
        return max(0, stage.steps - stage.step) * stage.step_seconds / 3600 * width
    hours = planned.get("gpu_hours")
    return float(hours) if isinstance(hours, int | float) and not stage.step else None


def _gpus(stage: StageState, jobs: Sequence[JobState]) -> int:
    """GPUs that a segment of the stage takes."""
    own = [job.gpus for job in jobs if job.stage == stage.name and job.kind == "segment"]
    own += [attempt.gpus for attempt in stage.attempts]
    if own:
        return own[-1]
    cluster = stage.settings.get("cluster")
    per_node = cluster.get("gpus_per_node") if isinstance(cluster, Mapping) else 0
    return _ranks(stage) if per_node else 0


def _ranks(stage: StageState) -> int:
    parallel = stage.settings.get("parallel")
    size = parallel.get("world_size") if isinstance(parallel, Mapping) else 1
    return size if isinstance(size, int) else 1


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _cost(settings: Mapping[str, Any]) -> tuple[str, float] | None:
    try:
        site = settings["cluster"]["site"]
        unit, rate = str(site["cost_unit"]), float(site["cost_per_gpu_hour"])
    except (KeyError, TypeError, ValueError):
        return None
    return None if unit == "GPU-hours" else (unit, rate)


def _stage_dirs(root: Path, plan: Mapping[str, Any]) -> list[Path]:
    there = {path.name for path in root.glob("stage[0-9]*") if path.is_dir()}
    return [root / name for name in sorted(there | set(plan))]


def _plan(root: Path) -> dict[str, Mapping[str, Any]]:
    """The stages of plan.json by name; empty where it is missing or damaged."""
    try:
        stages = json.loads((root / "plan.json").read_text(encoding="utf-8"))["stages"]
        return {str(stage["name"]): stage for stage in stages}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _uses_slurm(plan: Mapping[str, Mapping[str, Any]], records: Sequence[JobRecord]) -> bool:
    # A submission that was killed at once may have left jobs and no record.
    return bool(records) or any(stage.get("cluster") != "local" for stage in plan.values())


def runs_here(root: Path, stage: StageState) -> bool:
    """Whether the local executor on this machine is at work on the run, and at this stage."""
    try:
        pid = int((root / ".lock").read_text(encoding="ascii").strip())
        os.kill(pid, 0)
    except PermissionError:
        pass  # somebody else's, and alive
    except (OSError, ValueError, OverflowError):
        return False
    try:
        if b"slurm" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False  # the number was given to another program since
    except OSError:
        return False
    if stage.attempts:
        return stage.attempts[-1].ended is None
    return stage.last_sign is not None and time.time() - stage.last_sign < 600


def _excluded(root: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    try:
        found = exclude.entries(root)
    except (ConfigError, OSError) as error:
        return {}, (str(error),)
    return {node: str(entry.get("reason", "")) for node, entry in found.items()}, ()
