"""What Slurm says of one run, asked at most once a minute: one squeue, at most one sacct.

The answer is kept in the run directory (`.status.json`), so that `watch make status`, by several
people at once, costs the controller one question a minute.
"""

import json
import os
import pwd
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from slurm import commands
from slurm.answers import AccountedJob, QueuedJob
from slurm.errors import SlurmError
from slurm.files import write_text
from slurm.job import RECORD, JobRecord

CACHE = ".status.json"
SECONDS = 60.0  # for which an answer holds
_FORMAT = 1
_COMMENT = "amalia-vl:"


@dataclass(frozen=True)
class QueueLook:
    """Slurm's answers for the jobs of one run."""

    taken: float  # seconds since 1970
    known: tuple[str, ...]  # ids of the job.json files of that moment
    jobs: tuple[QueuedJob, ...] | None  # None: squeue gave no answer
    accounts: dict[str, AccountedJob] | None  # None: no accounting
    problem: str = ""  # why there is no answer


def look(root: Path, records: Sequence[JobRecord], refresh: bool = False) -> QueueLook:
    """Ask Slurm about the run in `root`, or take the answer of less than a minute ago.

    One that was given before the newest submission does not count. Raises nothing: a Slurm that
    does not answer is part of the answer.
    """
    known = tuple(sorted(record.job_id for record in records))
    now = time.time()
    if not refresh:
        kept = _read(root / CACHE)
        if kept is not None and 0 <= now - kept.taken < SECONDS and kept.known == known:
            return kept
    fresh = _ask(root, records, known, now)
    # A colleague who may not write here asks every time.
    with suppress(OSError):
        write_text(root / CACHE, json.dumps({"format": _FORMAT, **asdict(fresh)}) + "\n")
        os.chmod(root / CACHE, 0o664)
    return fresh


def forget(root: Path) -> None:
    """The next `look` asks anew."""
    with suppress(OSError):
        (root / CACHE).unlink(missing_ok=True)


def of_run(
    jobs: Sequence[QueuedJob], root: Path, records: Sequence[JobRecord]
) -> tuple[QueuedJob, ...]:
    """Those of `jobs` that belong to the run: by its comment, or by id and name."""
    mine = f"{_COMMENT}{os.path.abspath(root)}"
    names = {record.job_id: record.name for record in records}
    # An id alone is not enough: a Slurm that was set up anew counts from the start.
    return tuple(job for job in jobs if job.comment == mine or names.get(job.job_id) == job.name)


def owners(records: Sequence[JobRecord]) -> str | None:
    """Whose jobs to ask for, as squeue takes it; None: one's own."""
    users = {os.getuid()}
    for record in records:
        with suppress(OSError):
            users.add((Path(record.directory) / RECORD).stat().st_uid)
    return None if len(users) == 1 else ",".join(str(uid) for uid in sorted(users))


def jobs_of(root: Path, records: Sequence[JobRecord]) -> tuple[QueuedJob, ...]:
    """Ask squeue now for the run's jobs, also ended ones that it remembers. Raises SlurmError."""
    return of_run(commands.squeue(user=owners(records)), root, records)


def user_name() -> str:
    """The name of whoever runs this, as squeue prints it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _ask(root: Path, records: Sequence[JobRecord], known: tuple[str, ...], now: float) -> QueueLook:
    try:
        jobs = jobs_of(root, records)
    except SlurmError as error:
        if error.cause == "missing":
            return QueueLook(now, known, None, None, "no Slurm on this machine")
        return QueueLook(now, known, None, None, str(error))
    ids = sorted({*known, *(job.job_id for job in jobs)}, key=lambda text: (len(text), text))
    return QueueLook(now, known, jobs, commands.sacct(ids))


def _read(path: Path) -> QueueLook | None:
    """The kept answer; None where there is none that can be used (others may write here)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != _FORMAT:
            return None
        jobs, accounts = value["jobs"], value["accounts"]
        return QueueLook(
            taken=float(value["taken"]),
            known=tuple(value["known"]),
            jobs=None if jobs is None else tuple(_typed(QueuedJob(**job)) for job in jobs),
            accounts=None
            if accounts is None
            else {key: _typed(AccountedJob(**job)) for key, job in accounts.items()},
            problem=str(value["problem"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


_Job = TypeVar("_Job", QueuedJob, AccountedJob)


def _typed(job: _Job) -> _Job:
    """TypeError unless texts are texts and numbers numbers."""
    kinds = {"str": str, "int": int, "float": int | float}
    for field in fields(job):
        value, (kind, *optional) = getattr(job, field.name), str(field.type).split(" | ")
        kind = getattr(field.type, "__name__", kind)
        if not (isinstance(value, kinds[kind]) or (optional and value is None)):
            raise TypeError(f"{field.name} is {value!r}")
    return job
