"""How far the arrays of a run are: elements from the markers of their items and from squeue."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema.errors import ConfigError
from slurm.array_items import DONE, FAILED, STOPPED, TaskFolder, read_wave
from slurm.job_state import JobState
from slurm.verify import STOP


@dataclass(frozen=True)
class ArrayState:
    """One task (`arrays/TASK`): its newest submission."""

    task: str
    wave: int  # the newest
    running: int  # elements, by Slurm
    pending: int
    items: int = 0  # of the waves of the submission so far
    items_done: int = 0
    items_failed: int = 0  # and not done since
    elements: int = 0  # of the newest wave
    elements_done: int = 0
    elements_failed: int = 0
    waiting: int = 0  # elements for later waves
    failure: str = ""  # one of the failed items and its last line
    problem: str = ""  # a damaged record
    stopped: str = ""  # why a job did not submit the rest, and what to type
    stop_file: str = ""  # which keeps it from going on


def array_states(root: Path, jobs: Sequence[JobState]) -> list[ArrayState]:
    """Every array task of the run in `root`, by name."""
    folders = sorted(path for path in root.glob("arrays/*") if path.is_dir())
    return [_state(TaskFolder(folder), jobs) for folder in folders]


def _state(folder: TaskFolder, jobs: Sequence[JobState]) -> ArrayState:
    task = folder.root.name
    live = [job for job in jobs if job.task == task and job.kind == "array" and job.is_live]
    running = sum(job.running for job in live)
    pending = sum(job.pending for job in live)
    numbers = folder.waves()
    try:
        newest = read_wave(folder.wave(numbers[-1])) if numbers else None
        waves = [read_wave(folder.wave(number)) for number in numbers[:-1]]
    except ConfigError as error:
        return ArrayState(task, numbers[-1], running, pending, problem=str(error))
    if newest is None:
        return ArrayState(task, 0, running, pending)
    done, failed = _names(folder, DONE), _names(folder, FAILED)
    failed -= done
    submission = [wave for wave in waves if wave.submission == newest.submission]
    items = {i.name for wave in (*submission, newest) for e in wave.elements for i in e}
    names = [{item.name for item in element} for element in newest.elements]
    failing = sorted(items & failed)
    return ArrayState(
        task=task,
        wave=newest.number,
        items=len(items),
        items_done=len(items & done),
        items_failed=len(failing),
        elements=len(names),
        elements_done=sum(element <= done for element in names),
        elements_failed=sum(bool(element & failed) for element in names),
        running=running,
        pending=pending,
        waiting=newest.waiting,
        failure=_failure(folder, failing[0]) if failing else "",
        stopped=_stopped(folder),
        stop_file=str(folder.root / STOP) if (folder.root / STOP).exists() else "",
    )


def _stopped(folder: TaskFolder) -> str:
    try:
        value = json.loads((folder.root / STOPPED).read_text(encoding="utf-8"))
        return f"{value['reason']}; go on with: {value['command']}"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {folder.root / STOPPED}"


def _failure(folder: TaskFolder, item: str) -> str:
    record = folder.record(FAILED, item)
    return f"{item}: exit code {record.get('code')}: {record.get('said') or 'it said nothing'}"


def _names(folder: TaskFolder, kind: str) -> set[str]:
    """Items with a record of `kind`, from the names of the files alone."""
    try:
        entries = os.listdir(folder.root / kind)
    except OSError:
        return set()
    return {name.removesuffix(".json") for name in entries if name.endswith(".json")}
