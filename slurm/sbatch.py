"""Hand a chain to Slurm: every job, or none.

What may begin at once is submitted held and released when the last job is queued, so a refusal
half way, or a connection that breaks, never leaves a part of the chain running.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import CODE, PLAN
from slurm import commands, queue_state
from slurm.chain import absolute
from slurm.errors import SlurmError
from slurm.files import write_text
from slurm.job import RECORD, Job, JobRecord
from slurm.render import script
from slurm.run_directory import RunDirectory

Configs = Config | Mapping[str, Config]


class Interrupted(Exception):
    """A signal that came while jobs were being submitted."""


def submit(
    jobs: Sequence[Job],
    configs: Configs,
    run: RunDirectory,
    exclude: Sequence[str] = (),
    release: Sequence[str] = (),
) -> list[JobRecord]:
    """Write and submit `jobs` in order, job.json after each.

    Args:
        configs: that of each stage by name, or one for all.
        exclude: nodes to avoid.
        release: ids of jobs that are held since an earlier submission was cut short.

    Raises ConfigError when Slurm refuses one, after cancelling those before it.
    """
    code = snapshot_digest(run)
    submitted: dict[str, JobRecord] = {}
    held: list[str] = list(release)
    job = None
    marker = run.root / queue_state.SUBMITTING
    try:
        with _interruptible():
            write_text(marker, "jobs are being submitted; what is held is released in the end\n")
            for job in jobs:
                words = dependency(job, {name: it.job_id for name, it in submitted.items()})
                config = config_of(job, configs)
                write_script(job, config, run, words, exclude)
                # Whatever waits for another job of this chain waits for a held one in the end.
                hold = not any(name in submitted for name in (*job.after_ok, *job.after_any))
                job_id = commands.sbatch(job.script, ["--hold"] if hold else [])
                record = _record(job, job_id, config, words, code)
                submitted[job.name] = record
                record.write()
                held += [job_id] if hold else []
            job = None
            for job_id in held:
                commands.release(job_id)
    except (ConfigError, OSError, Interrupted, KeyboardInterrupt) as error:
        names = [job.name for job in jobs]
        remains = _roll_back(run, names, list(submitted.values()))
        marker.unlink(missing_ok=True)
        what = f"{job.name} was not submitted" if job is not None else "the jobs cannot begin"
        raise ConfigError(f"{what}: {error or 'interrupted'}; {remains}") from error
    marker.unlink(missing_ok=True)
    return list(submitted.values())


def write_script(
    job: Job, config: Config, run: RunDirectory, words: str = "", exclude: Sequence[str] = ()
) -> None:
    """Write the job's submit.sh into its folder."""
    job.directory.mkdir(parents=True, exist_ok=True)
    write_text(job.script, script(job, config, absolute(run) / CODE, words, exclude))


def dependency(job: Job, ids: Mapping[str, str]) -> str:
    """Slurm's words for what `job` waits for; names that `ids` lacks are ids already."""
    parts = []
    for kind, names in (("afterok", job.after_ok), ("afterany", job.after_any)):
        if names:
            parts.append(":".join([kind, *(ids.get(name, name) for name in names)]))
    return ",".join(parts)


def config_of(job: Job, configs: Configs) -> Config:
    """The configuration under which a job is submitted."""
    return configs if isinstance(configs, Config) else configs[job.stage]


def snapshot_digest(run: RunDirectory) -> str:
    """SHA-256 of the run's snapshot, from its plan.json."""
    path = run.root / PLAN
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not name the run's code ({error}); restore it") from error


def _record(job: Job, job_id: str, config: Config, words: str, code: str) -> JobRecord:
    return JobRecord(
        job_id=job_id,
        name=job.name,
        kind=job.kind,
        stage=job.stage,
        number=job.number,
        directory=str(job.directory),
        cluster=config.cluster.name,
        nodes=job.nodes,
        gpus=job.nodes * job.gpus_per_node,
        hours=job.hours,
        dependency=words,
        submitted=time.time(),
        code=code,
        elements=job.elements,
        throttle=job.throttle,
    )


def _roll_back(run: RunDirectory, names: Sequence[str], submitted: Sequence[JobRecord]) -> str:
    """Cancel what has been submitted, also what sbatch took without an answer; says the outcome."""
    ids = {record.job_id for record in submitted}
    with suppress(ConfigError, OSError):
        ids |= {job_id for job_id, job in queue_state.live(run).items() if job.name in names}
    if not ids:
        return "nothing is queued"
    try:
        commands.scancel(sorted(ids, key=int))
    except SlurmError as error:
        return f"cancel {' '.join(sorted(ids, key=int))} by hand: {error}"
    for record in submitted:
        with suppress(OSError):
            (Path(record.directory) / RECORD).unlink(missing_ok=True)
    what = "the job" if len(ids) == 1 else f"each of the {len(ids)} jobs"
    return f"{what} submitted until then was cancelled, nothing is queued"


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP (a lost connection) become an exception, so that they roll back."""

    def received(number: int, _: FrameType | None) -> None:
        raise Interrupted(f"ended by {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's affair
        return
    # Under nohup a lost connection is to be ignored.
    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, received) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
