"""Which jobs of a run are queued or running now: one call of squeue, whatever has been lost.

A job is known by its job.json, and by its Slurm comment, which names the run directory; so a
submission that was killed leaves no unknown job behind.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm import commands
from slurm.answers import QueuedJob
from slurm.chain import LiveJobs, absolute
from slurm.job import FOLDERS, RECORD, records
from slurm.render import comment
from slurm.run_directory import RunDirectory

SUBMITTING = ".submitting"  # in the run directory for as long as jobs are being submitted
_NAME = re.compile(r"\.(?:(?P<stage>stage\d+)\.(?P<verify>verify\.)?|(?P<export>export)\.)\d+$")


@dataclass(frozen=True)
class Queue:
    """What one look at the queue tells of a run."""

    jobs: Mapping[str, QueuedJob]  # the run's live jobs by id, an array once
    of_user: int  # live jobs of this user, whatever run; elements count


def ask(run: RunDirectory) -> Queue:
    """The run's jobs that wait, run, or will run again.

    Raises SlurmError where squeue fails, ConfigError where a record is damaged.
    """
    mine = comment(absolute(run))
    known = {record.job_id: record.name for record in records(run.root)}
    jobs = [job for job in commands.squeue() if job.is_live]
    of_user = len(jobs)
    for uid in colleagues(run.root):
        jobs += [job for job in commands.squeue(user=str(uid)) if job.is_live]
    found: dict[str, QueuedJob] = {}
    for job in jobs:
        # An id alone is not enough: a Slurm that was set up anew counts from the start.
        if job.comment == mine or known.get(job.job_id) == job.name:
            found.setdefault(job.job_id, job)
    return Queue(found, of_user)


def live(run: RunDirectory) -> dict[str, QueuedJob]:
    """`ask(run).jobs`."""
    return dict(ask(run).jobs)


def held_by_a_cut_submission(run: RunDirectory, queue: Queue) -> list[str]:
    """Ids of jobs that a submission which was killed could not release any more."""
    if not (run.root / SUBMITTING).exists():
        return []
    return [job_id for job_id, job in queue.jobs.items() if job.reason == "JobHeldUser"]


def sort(jobs: Mapping[str, QueuedJob]) -> LiveJobs:
    """The live jobs of a chain by stage; those of arrays are left out."""
    segments: dict[str, tuple[str, ...]] = {}
    verifiers: dict[str, str] = {}
    export = None
    for job_id in sorted(jobs, key=int):
        part = _NAME.search(jobs[job_id].name)
        if part is None:
            continue
        stage = part["stage"]
        if part["export"]:
            export = job_id
        elif part["verify"]:
            verifiers[stage] = job_id
        else:
            segments[stage] = (*segments.get(stage, ()), job_id)
    return LiveJobs(segments, verifiers, export, frozenset(job.name for job in jobs.values()))


def colleagues(root: Path) -> set[int]:
    """User ids of others who have submitted jobs of the run."""
    paths = (path for folder in FOLDERS for path in root.glob(f"{folder}/[0-9]*/{RECORD}"))
    return {path.stat().st_uid for path in paths} - {os.getuid()}
