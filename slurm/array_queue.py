"""What of a run's arrays is queued or running, and what follows from it for a new wave."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import PLAN, code_digest
from slurm import commands, queue_state, run_directory, sbatch
from slurm.answers import QueuedJob
from slurm.array_items import Item, TaskFolder, Wave, read_wave
from slurm.array_waves import NEXT
from slurm.chain import absolute
from slurm.job import RECORD, records
from slurm.render import comment
from slurm.run_directory import RunDirectory

HELD = "JobHeldUser"  # squeue's reason


@dataclass(frozen=True)
class Rows:
    """One look at the queue: live jobs, elements by themselves."""

    of_run: Sequence[QueuedJob] = ()
    of_user: int = 0


def ask(run: RunDirectory) -> Rows:
    rows = [job for job in commands.squeue() if job.is_live]
    others = [commands.squeue(user=uid) for uid in map(str, queue_state.colleagues(run.root))]
    every = rows + [job for jobs in others for job in jobs if job.is_live]
    return Rows(of_run(run, every), len(rows))


@dataclass(frozen=True)
class Queued:
    """Jobs of one task that wait or run."""

    items: Mapping[str, Item]  # those of live elements, by name
    arrays: tuple[str, ...] = ()  # ids of live arrays
    next_job: str = ""  # id of the job that will submit the rest
    held: tuple[str, ...] = ()  # ids of jobs that a user, or a submission cut short, holds
    newest: int = 0  # number of a wave


def of_run(run: RunDirectory, rows: Sequence[QueuedJob]) -> list[QueuedJob]:
    """Live jobs of a run, each element of an array by itself."""
    mine = comment(absolute(run))
    known = {record.job_id: record.name for record in records(run.root)}
    return [
        job
        for job in rows
        if job.is_live and (job.comment == mine or known.get(job.job_id) == job.name)
    ]


def queued(folder: TaskFolder, config: Config, live: Sequence[QueuedJob], own_id: str) -> Queued:
    """Sort the run's live jobs: elements of this task, and the next wave's, but for `own_id`."""
    pattern = re.compile(re.escape(f"{config.run}.{folder.root.name}.") + rf"(\d+)(\.{NEXT})?")
    waves: dict[int, Wave] = {}
    items: dict[str, Item] = {}
    next_job, newest = "", 0
    arrays: list[str] = []
    held: list[str] = []
    for job in live:
        found = pattern.fullmatch(job.name)
        if found is None or job.job_id == own_id:
            continue
        if job.reason == HELD and job.job_id not in held:
            held.append(job.job_id)
        number = int(found[1])
        newest = max(newest, number)
        if found[2]:
            next_job = job.job_id
            continue
        if job.job_id not in arrays:
            arrays.append(job.job_id)
        if number not in waves:
            waves[number] = read_wave(folder.wave(number))
        elements = waves[number].elements
        if job.array_index is not None and job.array_index < len(elements):
            items |= {item.name: item for item in elements[job.array_index]}
    return Queued(items, tuple(arrays), next_job, tuple(held), newest)


def refuse_other_settings(queued: Queued, items: Sequence[Item], directory: Path) -> None:
    """ConfigError when an element that waits or runs would do another thing under the same name."""
    for item in items:
        other = queued.items.get(item.name, item)
        if other.words != item.words:
            raise ConfigError(
                f"{item.name} is queued with other settings ({directory}); give the old ones, wait "
                "for it, or cancel it (`make cancel`)"
            )


def cut_short(run: RunDirectory, rows: Rows, queued: Queued) -> list[str]:
    """Jobs of this task that a submission which was killed has left held.

    ConfigError where that submission was another command's: its jobs must not begin without it.
    """
    if not (run.root / queue_state.SUBMITTING).exists():
        return []
    held = [job for job in rows.of_run if job.reason == HELD]
    others = sorted({job.name for job in held if job.job_id not in queued.held})
    if others:
        raise ConfigError(
            f"{others[0]} is held since its submission was cut short; give that command again, or "
            "cancel it (`make cancel`), first"
        )
    return list(queued.held)


def take_snapshot(run: RunDirectory, live: Sequence[QueuedJob], dry: bool) -> None:
    """The jobs run the code of now; ConfigError when that is not what queued ones began with."""
    try:
        same = sbatch.snapshot_digest(run) == code_digest(run_directory.REPOSITORY)
    except ConfigError:
        same = False
    if same or (dry and (run.root / PLAN).exists()):
        return
    if live:
        raise ConfigError(
            f"{len(live)} jobs of {run.root} are queued or running with other code than is here "
            "now; wait for them, cancel them (`make cancel`), or choose another run=NAME"
        )
    run.record_code()


def free_number(folder: TaskFolder) -> int:
    """The next wave's number; one that was written but never submitted is taken again."""
    number = folder.next_number() - 1
    directory = folder.wave(number)
    unused = directory.is_dir() and not (directory / RECORD).exists()
    return number if unused and not any(directory.glob("log*.out")) else number + 1
