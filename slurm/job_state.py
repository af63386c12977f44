"""One job of a run as its readers see it: from squeue, else from sacct, else from the files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slurm.answers import AccountedJob, QueuedJob
from slurm.attempts import Attempt
from slurm.job import JobRecord
from slurm.queue_look import QueueLook
from slurm.reasons import failed_before, in_words

# Name of a job, behind the run's: stage2.003, stage2.verify.001, export.001, evaluate.002.next.
_NAME = re.compile(
    r"\.(?:(?P<stage>stage\d+)\.(?:(?P<verify>verify)\.)?|(?P<task>[^.]+)\.)(?P<number>\d+)"
    r"(?P<next>\.next)?$"
)
ENDED_WELL = ("COMPLETED",)
_OUTCOMES = {"done": "COMPLETED", "stopped": "COMPLETED", "killed": "KILLED"}
_OTHERWISE = "FAILED"
GONE = "ENDED"  # Slurm has forgotten it, and no file says how it ended
CANCELLED_EARLY = "cancelled before it began"
_NAMELESS = "allocation"  # sacct's word while the database has not heard of a job's name yet
UNKNOWN = "UNKNOWN"  # Slurm does not answer


@dataclass(frozen=True)
class JobState:
    """A job, or a whole array. Times are seconds since 1970, durations seconds; None: unknown."""

    job_id: str
    name: str
    kind: str  # slurm.job.KINDS
    stage: str  # of a stage, else ""
    task: str  # of an array, else ""
    number: int
    state: str  # Slurm's, or GONE, UNKNOWN, KILLED
    is_live: bool
    reason: str = ""  # in words
    nodes: int = 0
    node_list: str = ""
    gpus: int = 0
    start: float | None = None  # an estimate while it is pending
    used: float = 0.0
    left: float | None = None
    gpu_seconds: float | None = None  # by Slurm's accounting
    submitted: float = 0.0
    elements: int | None = None
    user: str = ""  # where squeue shows it
    running: int = 0  # elements of an array
    pending: int = 0

    @property
    def is_running(self) -> bool:
        return self.is_live and self.state not in ("PENDING", "REQUEUED", "SUSPENDED")

    @property
    def ended_badly(self) -> bool:
        return not self.is_live and self.state not in (*ENDED_WELL, GONE, UNKNOWN)


def job_states(
    records: Sequence[JobRecord], look: QueueLook | None, attempts: Mapping[str, Sequence[Attempt]]
) -> list[JobState]:
    """Every job of a run, oldest first.

    Args:
        attempts: those of each stage.
    """
    queued: dict[str, list[QueuedJob]] = {}
    for job in (look.jobs if look is not None else None) or ():
        queued.setdefault(job.job_id, []).append(job)
    names = {record.job_id: record.name for record in records}
    names |= {job_id: jobs[0].name for job_id, jobs in queued.items()}
    states = [_recorded(record, queued.get(record.job_id), look, attempts) for record in records]
    known = {record.job_id for record in records}
    states += [
        _unrecorded(jobs[0]) for job_id, jobs in sorted(queued.items()) if job_id not in known
    ]
    return [
        _merge(state, queued.get(state.job_id), names) if state.job_id in queued else state
        for state in states
    ]


def _merge(
    state: JobState, queued: Sequence[QueuedJob] | None, names: Mapping[str, str]
) -> JobState:
    """`state` with what squeue shows of it now."""
    assert queued
    live = [job for job in queued if job.is_live]
    running = [job for job in live if job.state not in ("PENDING", "REQUEUED", "SUSPENDED")]
    bad = [job for job in queued if not job.is_live and job.state not in ENDED_WELL]
    # Of an array: its most telling element.
    job = (running or live or bad or list(queued))[0]
    reason = in_words(job.reason, job.job_id)
    if live and job.reason == "Dependency" and job.dependency:
        reason = f"waits for {_waits(job.dependency, names)}"
    elif not live and job.state == "CANCELLED" and not job.used and not failed_before(job.reason):
        reason = CANCELLED_EARLY  # Slurm's word is that for which it was waiting
    return JobState(
        **{
            **vars(state),
            "state": job.state,
            "is_live": bool(live),
            "reason": reason,
            "nodes": job.nodes,
            "node_list": job.node_list,
            "start": job.start,
            "used": job.used,
            "left": job.left,
            "user": job.user,
            "running": len(running),
            "pending": len([job for job in live if job.state == "PENDING"]),
        }
    )


def _recorded(
    record: JobRecord,
    queued: Sequence[QueuedJob] | None,
    look: QueueLook | None,
    attempts: Mapping[str, Sequence[Attempt]],
) -> JobState:
    """What accounting and the files say of a submitted job."""
    accounts = (look.accounts if look is not None else None) or {}
    mine = [
        job
        for key, job in accounts.items()
        if key.split("_")[0] == record.job_id and job.name in (record.name, _NAMELESS)
    ]
    state, reason = _ending(record, mine, look, attempts.get(record.stage, ()))
    parts = _NAME.search(record.name)
    is_array = record.kind in ("array", "next_wave")
    return JobState(
        job_id=record.job_id,
        name=record.name,
        kind=record.kind,
        stage="" if is_array else record.stage,
        task=parts["task"] if parts is not None and parts["task"] and is_array else "",
        number=record.number,
        state=state,
        is_live=False,
        reason=reason,
        nodes=record.nodes,
        gpus=record.gpus,
        start=next((job.start for job in mine if job.start is not None), None),
        used=sum(job.seconds for job in mine),
        gpu_seconds=sum(job.gpu_seconds for job in mine) if mine else None,
        submitted=record.submitted,
        elements=record.elements,
    )


def _ending(
    record: JobRecord,
    accounted: Sequence[AccountedJob],
    look: QueueLook | None,
    attempts: Sequence[Attempt],
) -> tuple[str, str]:
    """(state, reason) of a job that squeue does not show."""
    bad = [job for job in accounted if job.state not in ENDED_WELL]
    if accounted:
        job = (bad or list(accounted))[0]
        # Accounting may give a job that never began its end as its start.
        if job.state == "CANCELLED" and not job.seconds and record.dependency:
            return job.state, "never began: predecessor failed, or cancelled"
        return job.state, "" if job.state in ENDED_WELL else f"exit code {job.exit_code}"
    own = [attempt for attempt in attempts if attempt.job_id == record.job_id]
    if own and own[-1].outcome:
        return _OUTCOMES.get(own[-1].outcome, _OTHERWISE), own[-1].reason
    if look is None or look.jobs is None:
        return UNKNOWN, ""
    return GONE, "Slurm has forgotten it"


def _unrecorded(job: QueuedJob) -> JobState:
    """A job that only Slurm knows of: its submission was killed before it could write job.json."""
    parts = _NAME.search(job.name)
    stage, task = (parts["stage"], parts["task"]) if parts is not None else (None, None)
    kind = "segment" if stage else "export" if task == "export" else "array"
    if parts is not None and (parts["verify"] or parts["next"]):
        kind = "verify" if parts["verify"] else "next_wave"
    return JobState(
        job_id=job.job_id,
        name=job.name,
        kind=kind,
        stage=stage or "",
        task=task or "" if kind in ("array", "next_wave") else "",
        number=int(parts["number"]) if parts is not None else 0,
        state=job.state,
        is_live=job.is_live,
        submitted=job.submitted or 0.0,
    )


def _waits(dependency: str, names: Mapping[str, str]) -> str:
    """ "afterok:12(unfulfilled),afterany:13:14" -> "success of stage1.verify.001, end of ..."."""
    parts = []
    for kind, ids in re.findall(r"(after\w*):([\d:_*()a-z]+)", dependency):
        waited = [short(names.get(job_id, job_id)) for job_id in re.findall(r"\d+", ids)]
        parts.append((kind, waited))
    words = []
    for kind in dict.fromkeys(kind for kind, _ in parts):
        waited = list(dict.fromkeys(name for other, ids in parts if other == kind for name in ids))
        if len(waited) > 2:
            waited = [f"{waited[0]} to {waited[-1].rpartition('.')[2]}"]
        words.append(f"{'success' if kind == 'afterok' else 'end'} of {', '.join(waited)}")
    return " and ".join(words)


def short(name: str) -> str:
    """`demo.stage1.verify.001` without the run's name."""
    parts = _NAME.search(name)
    return name[parts.start() + 1 :] if parts is not None else name
