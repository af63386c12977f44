"""Which jobs of a run are queued or running now: one call of squeue, whatever has been lost.

A job is known by its job.json, and by its Slurm comment, which names the run directory; so a
submission that was killed leaves no unknown job behind.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from slurm import commands
from slurm.chain import LiveJobs, absolute
from slurm.commands import QueuedJob
from slurm.job import FOLDERS, RECORD, records
from slurm.render import comment
from slurm.run_directory import RunDirectory

_NAME = re.compile(r"\.(?:(?P<stage>stage\d+)\.(?P<verify>verify\.)?|(?P<export>export)\.)\d+$")


def live(run: RunDirectory) -> dict[str, QueuedJob]:
    """The run's jobs that wait, run, or will run again, by job id (an array once).

    Raises SlurmError where squeue fails, ConfigError where a record is damaged.
    """
    mine = comment(absolute(run))
    known = {record.job_id: record.name for record in records(run.root)}
    found: dict[str, QueuedJob] = {}
    for job in _queued(run):
        # An id alone is not enough: a Slurm that was set up anew counts from the start.
        if job.is_live and (job.comment == mine or known.get(job.job_id) == job.name):
            found.setdefault(job.job_id, job)
    return found


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
    return LiveJobs(segments, verifiers, export)


def _queued(run: RunDirectory) -> list[QueuedJob]:
    """What squeue knows of this user, and of a colleague who has submitted jobs of the run."""
    jobs = commands.squeue()
    owners = {path.stat().st_uid for folder in FOLDERS for path in _records(run.root, folder)}
    for uid in owners - {os.getuid()}:
        jobs += commands.squeue(user=str(uid))
    return jobs


def _records(root: Path, folder: str) -> list[Path]:
    return list(root.glob(f"{folder}/[0-9]*/{RECORD}"))
