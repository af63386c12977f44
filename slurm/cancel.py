"""Cancel what is queued of a run; what trains is asked to save first.

    python -m slurm.cancel run=NAME [runs_dir=runs] [stage=stage2] [now=true]

Pending jobs are held, then cancelled, so that none starts because the one before it is gone.
Running segments save, stop and end by themselves; other running jobs (a verifier, the export,
elements of arrays) have nothing to lose and are cancelled. The command that submitted the run goes
on from the last checkpoint.

    stage=stage2    that stage and what comes after it
    now=true        running segments are not waited for either: steps since the last save are lost
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from slurm import arguments as words
from slurm import command_line, commands, queue_look
from slurm.errors import SlurmError
from slurm.job import JobRecord
from slurm.job_state import JobState, job_states, short
from slurm.run_state import readable_records, runs_here
from slurm.stage_state import read as read_stage
from slurm.status_text import age, clean
from slurm.steer import EXIT, touch
from slurm.verify import DONE

KNOWN = {"run": "", "runs_dir": words.RUNS, "stage": "", "now": ""}


def cancel(root: Path, stage: str = "", now: bool = False) -> list[str]:
    """Cancel the run's jobs, or those of `stage` and after it; returns a line for each thing done.

    Two calls of squeue at most, and one each of scontrol and scancel for what waits.
    Raises SlurmError: Slurm does not answer, or refuses; its message begins with what was done.
    """
    records, problems = readable_records(root)
    said = [f"warning: {problem}" for problem in problems]
    here = _stop_local(root, stage)
    try:
        jobs = _live(root, records, stage)
    except SlurmError as error:
        if records or error.cause not in ("missing", "configuration"):
            raise
        return [*said, *(here or ["nothing of this run was ever queued"])]
    said += here
    foreign = [job for job in jobs if not _is_mine(job)]
    said += [
        f"{_named([job])} belongs to {job.user}: `python -m slurm.steer run={root.name} stop` asks "
        "it to save and end"
        for job in foreign
    ]
    mine = [job for job in jobs if _is_mine(job)]
    waiting = [job for job in mine if job.pending or not job.is_running]
    try:
        if waiting:
            _cancel_waiting([job.job_id for job in waiting])
            said.append(f"cancelled before they began: {_named(waiting)}")
            # One may have begun meanwhile.
            mine = [job for job in _live(root, records, stage) if _is_mine(job)]
        said += _stop_running(root, [job for job in mine if job.is_running], now)
    except SlurmError as error:
        raise SlurmError("; ".join([*said, str(error)]), error.cause) from error
    finally:
        queue_look.forget(root)
    if not jobs and not here:
        return [*said, "nothing of it is queued or running"]
    stages = sorted({job.stage for job in jobs if job.stage})
    return [*said, *_saved(root, stages)]


def _live(root: Path, records: Sequence[JobRecord], stage: str) -> list[JobState]:
    """The run's live jobs, of `stage` and after it where one is given."""
    look = queue_look.QueueLook(time.time(), (), queue_look.jobs_of(root, records), None)
    live = [job for job in job_states(records, look, {}) if job.is_live]
    if not stage:
        return live
    return [job for job in live if job.stage >= stage or job.kind == "export"]


def _is_mine(job: JobState) -> bool:
    return os.getuid() == 0 or job.user in ("", queue_look.user_name())


def _cancel_waiting(ids: Sequence[str]) -> None:
    # Cancelling one job makes another eligible that only waited for its end; a held one stays.
    # One that has begun or gone meanwhile cannot be held, which is no harm.
    with suppress(SlurmError):
        commands.hold(*ids)
    commands.scancel(ids, pending_only=True)


def _stop_running(root: Path, running: Sequence[JobState], now: bool) -> list[str]:
    ending = [job for job in running if job.kind == "segment" and not now and _is_done(root, job)]
    running = [job for job in running if job not in ending]
    saving = [job for job in running if job.kind == "segment" and not now]
    at_once = [job for job in running if job not in saving and job.state != "COMPLETING"]
    said = [f"its stage is done, it is ending: {_named(ending)}"] if ending else []
    if at_once:
        commands.scancel([job.job_id for job in at_once])
        said.append(f"cancelled while running: {_named(at_once)}")
    if saving:
        for job in saving:
            with suppress(OSError):  # the signal says the same
                touch(root / job.stage / EXIT)
        # The shell first: between two steps of the job it is the only one to hear of it.
        ids = [job.job_id for job in saving]
        commands.scancel(ids, signal="USR2", batch=True)
        commands.scancel(ids, signal="USR2")
        said.append(f"asked to save and end: {_named(saving)}; `make status` shows when it has")
    return said


def _is_done(root: Path, job: JobState) -> bool:
    return (root / job.stage / DONE).exists()


def _stop_local(root: Path, stage: str) -> list[str]:
    """Ask a run of this machine's local executor to save and end."""
    said = []
    for directory in sorted(root.glob("stage[0-9]*")):
        if directory.name >= stage and runs_here(root, read_stage(directory)):
            touch(directory / EXIT)
            said.append(f"asked to save and end: {directory.name}, which runs on this machine")
    return said


def _saved(root: Path, stages: Sequence[str]) -> list[str]:
    said = []
    for name in stages:
        files = read_stage(root / name)
        if files.saved_step is not None and files.saved_at is not None:
            ago = age(time.time() - files.saved_at)
            said.append(f"{name}: saved last after step {files.saved_step}, {ago} ago")
        elif files.has_begun:
            said.append(f"{name}: nothing was saved yet")
    return [*said, "the command that submitted the run goes on from there"]


def _named(jobs: Sequence[JobState]) -> str:
    return ", ".join(f"{short(job.name)} ({job.job_id})" for job in jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(_command, arguments, __doc__, needs_words=False)


def _command(given: list[str]) -> None:
    values = words.parse(given, KNOWN)
    root = words.run_directory(values)
    words.check_stage(root, values["stage"])
    for said in cancel(root, values["stage"], words.boolean(values, "now")):
        print(clean(said))


if __name__ == "__main__":
    sys.exit(main())
