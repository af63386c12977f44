"""A RunState as text for a terminal of 100 columns, and as plain values for programs."""

import math
import os
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slurm.array_state import ArrayState
from slurm.job_state import CANCELLED_EARLY, JobState, short
from slurm.run_state import RunState, StageSummary

WIDTH = 100  # columns, where the terminal does not say
_NARROWEST = 24  # of the last column
_STAGES = ("stage", "state", "step", "loss", "tokens/s", "MFU", "saved", "used", "left")
_JOBS = ("job", "id", "state", "nodes", "time", "")


def text(state: RunState, every_job: bool = False, now: float | None = None) -> str:
    """The whole report; `every_job` shows ended jobs too, not only those that tell something."""
    now = time.time() if now is None else now
    parts = [_head(state, now)]
    if state.stages:
        rows = [_stage_row(stage, now) for stage in state.stages]
        parts.append(f"{_columns([_STAGES, *rows])}\n{_hours(state)}")
    jobs = [job for job in state.jobs if every_job or _tells(job, state)]
    if jobs:
        planned = {stage.files.name: stage.segments for stage in state.stages}
        groups = [[job] for job in jobs] if every_job else _grouped(jobs)
        parts.append(_columns([_JOBS, *(_job_row(group, planned, now) for group in groups)]))
    if state.arrays:
        parts.append("\n".join(_array_line(array) for array in state.arrays))
    remarks = _remarks(state)
    if remarks:
        parts.append("\n".join(remarks))
    return "\n\n".join(parts)


def line(state: RunState) -> str:
    """A run in one line."""
    stages = [_in_short(stage) for stage in state.stages]
    done = [f"exported to {state.export}"] if state.export else []
    return clean(f"{state.root.name}: {', '.join([*stages, *done]) or 'nothing has begun'}")


def as_json(state: RunState) -> dict[str, Any]:
    """Plain values; numbers that JSON does not have (a loss that is NaN) are null."""
    look = state.look
    value = {
        "format": 1,
        "run": state.root.name,
        "directory": os.path.abspath(state.root),
        "asked": None if look is None else look.taken,
        "queue_problem": "" if look is None else look.problem,
        "accounting": look is not None and look.accounts is not None,
        "unit": state.unit,
        "hours_used": sum(stage.hours_used for stage in state.stages) + state.other_hours_used,
        "hours_left": _sum([stage.hours_left for stage in state.stages]),
        "stages": [_stage_json(stage) for stage in state.stages],
        "jobs": [asdict(job) for job in state.jobs],
        "arrays": [asdict(array) for array in state.arrays],
        "stop_files": list(state.stop_files),
        "excluded_nodes": dict(state.excluded),
        "export": state.export,
        "problems": list(state.problems),
    }
    finite = _finite(value)
    assert isinstance(finite, dict)
    return finite


def duration(seconds: float) -> str:
    """3725 -> 1:02:05, two days and more 2-03:04:05, as Slurm has it."""
    days, rest = divmod(max(0, round(seconds)), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    return (
        f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"
        if days
        else f"{hours}:{minutes:02d}:{rest:02d}"
    )


def age(seconds: float) -> str:
    """How long ago, in one unit."""
    seconds = max(0.0, seconds)
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129600, 3600, "h")):
        if seconds < limit:
            return f"{round(seconds / unit)} {name}"
    return f"{round(seconds / 86400)} days"


def clean(value: str) -> str:
    """Without the control characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in value)


def _head(state: RunState, now: float) -> str:
    look = state.look
    said = "no Slurm job belongs to it"
    if look is not None:
        said = f"Slurm asked {age(now - look.taken)} ago"
        if now - look.taken >= 1:
            said += " (refresh=true asks again)"
        if look.jobs is None:
            said = f"from the files alone: {look.problem}"
    return clean(f"run {state.root.name} ({os.path.abspath(state.root)}); {said}")


def _stage_row(stage: StageSummary, now: float) -> tuple[str, ...]:
    files = stage.files
    steps = "?" if files.steps is None else str(files.steps)
    saved = ""
    if files.saved_step is not None and files.saved_at is not None:
        saved = f"{files.saved_step}, {age(now - files.saved_at)} ago"
    return (
        files.name,
        stage.state,
        f"{files.step}/{steps}",
        "" if files.loss is None else f"{files.loss:.4f}",
        "" if files.tokens_per_second is None else f"{files.tokens_per_second:,.0f}",
        "" if files.mfu is None else f"{100 * files.mfu:.1f} %",
        saved,
        _amount(stage.hours_used),
        "?" if stage.hours_left is None else _amount(stage.hours_left),
    )


def _hours(state: RunState) -> str:
    used = sum(stage.hours_used for stage in state.stages) + state.other_hours_used
    left = _sum([stage.hours_left for stage in state.stages])
    known = "unknown" if left is None else _amount(left)
    words = f"{state.unit}: {_amount(used)} used, {known} left"
    if state.cost is not None and state.unit == "GPU-hours":
        unit, rate = state.cost
        more = "" if left is None else f", {_amount(left * rate)} left"
        words += f" ({_amount(used * rate)} {unit} used{more})"
    by = state.look is not None and state.look.accounts is not None
    source = "Slurm's accounting" if by else "the run's own records"
    return f"{words}, by {source}"


def _grouped(jobs: Sequence[JobState]) -> list[list[JobState]]:
    """Segments that only wait for the one before them stand together."""
    groups: list[list[JobState]] = []
    for job in jobs:
        before = groups[-1][-1] if groups else job
        follows = (before.kind, before.stage, before.state) == ("segment", job.stage, "PENDING")
        if groups and job.kind == "segment" and job.state == "PENDING" and follows:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def _job_row(group: Sequence[JobState], planned: Mapping[str, int], now: float) -> tuple[str, ...]:
    job, last = group[0], group[-1]
    job_id = job.job_id if job is last else f"{job.job_id}-{last.job_id}"
    name = short(job.name)
    if job.kind == "segment":
        numbers = f"{job.number}" if job is last else f"{job.number}-{last.number}"
        name = f"{job.stage} segment {numbers}/{max(last.number, planned.get(job.stage, 0))}"
    elif job.kind == "verify":
        name = f"{job.stage} verify {job.number}"
    elif job.task:
        name = f"{job.task} wave {job.number}{' next' if job.kind == 'next_wave' else ''}"
    when = ""
    if job.is_running:
        left = "" if job.left is None else f" of {duration(job.used + job.left)}"
        when = f"{duration(job.used)}{left}"
    elif job.is_live and job.start is not None and job.start > now:
        when = time.strftime("~ %d %b %H:%M", time.localtime(job.start))
    elif not job.is_live and job.used:
        when = duration(job.used)
    why = job.reason
    if job.is_running and job.elements is None:
        why = job.node_list
    if job is not last:
        why = f"{why}; one after the other" if why else "one after the other"
    return (name, job_id, job.state, str(job.nodes or ""), when, why)


def _array_line(array: ArrayState) -> str:
    if array.problem:
        return f"array {array.task}: {array.problem}"
    words = (
        f"array {array.task}, wave {array.wave}: {array.elements_done} of {array.elements} "
        f"elements done, {array.running} running, {array.pending} pending, "
        f"{array.elements_failed} failed"
    )
    if array.waiting:
        words += f", {array.waiting} for later waves"
    words += f"; {array.items_done} of {array.items} items done"
    if array.items_failed:
        words += f", {array.items_failed} failed ({array.failure})"
    return clean(words)


def _remarks(state: RunState) -> list[str]:
    """What a reader must know beside the tables."""
    found = []
    for stage in state.stages:
        files = stage.files
        if files.failure:
            found.append(f"{files.name} failed: {files.failure}")
        elif files.last_error and not files.is_done:
            found.append(f"{files.name}: last attempt {files.last_error}")
        if (files.failure or stage.state == "failed") and files.log:
            found.append(f"  log: {_near(files.log)}")
        found += [_trigger(path) for path in files.triggers if not files.is_done]
        if stage.state == "paused":
            found.append(
                f"{files.name}: nothing of it is queued; the command that submitted it goes on "
                f"from step {files.saved_step or 0}"
            )
    found += [_trigger(path) for path in state.stop_files]
    for array in state.arrays:
        found += [f"array {array.task} stopped: {array.stopped}"] if array.stopped else []
        found += [_trigger(array.stop_file)] if array.stop_file else []
    found += [f"node {node} is avoided: {reason}" for node, reason in state.excluded.items()]
    if state.export:
        found.append(f"Hugging Face folder: {state.export}")
    return [clean(words) for words in [*found, *state.problems]]


def _trigger(path: str) -> str:
    name = Path(path).name
    meaning = {
        "SAVE": "the next step is saved",
        "EXIT": "the segment that trains saves and ends",
        "STOP": "nothing starts until it is removed",
    }
    return f"{_near(path)} is there: {meaning[name]}"


def _tells(job: JobState, state: RunState) -> bool:
    """Live jobs, and the newest of a kind where it ended badly and has not been made good."""
    if job.is_live:
        return True
    if (
        not job.ended_badly
        or job.reason == CANCELLED_EARLY
        or any(s.files.name == job.stage and s.files.is_done for s in state.stages)
    ):
        return False
    kind = (job.kind, job.stage, job.task)
    return (
        job is [other for other in state.jobs if (other.kind, other.stage, other.task) == kind][-1]
    )


def _in_short(stage: StageSummary) -> str:
    files = stage.files
    if stage.state in ("done", "not begun"):
        return f"{files.name} {stage.state}"
    steps = "" if files.steps is None else f"/{files.steps}"
    return f"{files.name} {stage.state} at {files.step}{steps}"


def _stage_json(stage: StageSummary) -> dict[str, Any]:
    files = stage.files
    return {
        "name": files.name,
        "state": stage.state,
        "segment": None if stage.segment is None else stage.segment.number,
        "segments": stage.segments,
        "job_id": None if stage.segment is None else stage.segment.job_id,
        "hours_used": stage.hours_used,
        "hours_left": stage.hours_left,
        **{
            name: getattr(files, name)
            for name in (
                "step", "steps", "loss", "tokens_per_second", "step_seconds", "tflops_per_gpu",
                "mfu", "saved_step", "saved_at", "failure", "last_error", "log",
            )
        },
        "triggers": list(files.triggers),
        "attempts": [asdict(attempt) for attempt in files.attempts],
    }  # fmt: skip


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns, two blanks between; none that are empty, the last one wrapped."""
    used = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
    widths = {n: max(len(clean(row[n])) for row in rows) for n in used[:-1]}
    margin = sum(widths.values()) + 2 * len(widths)
    room = max(_NARROWEST, shutil.get_terminal_size((WIDTH, 24)).columns - margin)
    lines = []
    for row in rows:
        begin = "".join(f"{clean(row[n]).ljust(widths[n])}  " for n in used[:-1])
        parts = textwrap.wrap(clean(row[used[-1]]), room, break_on_hyphens=False) or [""]
        lines += [f"{begin}{parts[0]}", *(" " * margin + part for part in parts[1:])]
    return "\n".join(line.rstrip() for line in lines)


def _amount(hours: float) -> str:
    """Two digits behind the point for little, none for much."""
    return f"{hours:,.{2 if hours < 10 else 1 if hours < 1000 else 0}f}"


def _near(path: str) -> str:
    """Relative to where the command was given, where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
