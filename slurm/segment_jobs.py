"""What the end of a segment means for the jobs that are queued behind it."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conf.schema.errors import ConfigError
from slurm.job import RECORD, read_record, records


def cancel_later(stage_dir: Path, segment_dir: Path) -> None:
    """Cancel this stage's later segments that are pending: the verifier waits for all of them.

    A Slurm that does not answer is no error: a segment that is not needed ends by itself.
    """
    ids = [job_id for number, job_id in _segments(stage_dir) if number > int(segment_dir.name)]
    if not ids:
        return
    from slurm.commands import SlurmError, run

    try:
        # --state, for an older id may have been given to somebody's running job by now.
        run(["scancel", "--state=PENDING", "--me", *ids])
    except SlurmError as error:
        _warn(f"later segments of {stage_dir.name} were not cancelled ({error}); they end at once")


def was_preempted(own_job: str) -> bool:
    """Whether Slurm has asked this job, in this life of it, to make room for another."""
    if not own_job:
        return False
    from slurm.commands import SlurmError, run

    try:
        text = run(["scontrol", "show", "job", "--oneliner", own_job])
    except SlurmError as error:
        _warn(f"job {own_job} does not know whether it was preempted ({error})")
        return False
    times = {k: int(v) for k, v in re.findall(r"\b(StartTime|PreemptTime)=(\d+)\b", text)}
    # Slurm keeps the time of a preemption in an earlier life.
    return times.get("PreemptTime", -1) >= times.get("StartTime", 0)


def requeue(own_job: str) -> None:
    """Queue this very job again; nothing after it in the batch script is sure to run.

    After a preemption Slurm does so only with a job that still runs when its grace is over. One
    that has saved and ended before would have used up a segment, and another the next time.
    """
    from slurm import commands

    try:
        commands.requeue(own_job)
    except commands.SlurmError as error:
        _warn(f"job {own_job} is not queued again ({error}); the next segment goes on")


def avoid(stage_dir: Path, bad: Sequence[str], own_job: str) -> None:
    """Keep the run's pending jobs off bad nodes; they keep the nodes that the user named too.

    Nothing to do without `own_job`, outside Slurm.
    """
    if not own_job:
        return
    from slurm.commands import SlurmError, squeue, update

    excluded = ",".join(dict.fromkeys([*(cluster_settings(stage_dir).get("exclude") or ()), *bad]))
    try:
        ids = {record.job_id for record in records(stage_dir.parent)}
        waiting = {job.job_id for job in squeue() if job.state == "PENDING"}
    except ConfigError as error:
        _warn(f"queued jobs may still get {', '.join(bad)} ({error})")
        return
    for job_id in sorted(ids & waiting, key=int):
        try:
            update(job_id, ExcNodeList=excluded)
        except SlurmError as error:
            _warn(f"job {job_id} may still get {', '.join(bad)} ({error})")


def cluster_settings(stage_dir: Path) -> Mapping[str, Any]:
    """`cluster` of the stage's config.yaml as plain values, without Hydra; empty if damaged."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        value = yaml.load((stage_dir / "config.yaml").read_text(encoding="utf-8"), Loader=loader)
        cluster = value["cluster"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return cluster if isinstance(cluster, dict) else {}


def _segments(stage_dir: Path) -> Iterator[tuple[int, str]]:
    """(number, job id) of the stage's segments that were submitted."""
    for path in sorted(stage_dir.glob(f"segments/[0-9]*/{RECORD}")):
        try:
            record = read_record(path)
        except ConfigError as error:
            _warn(str(error))
            continue
        if record.job_id.isdigit():
            yield record.number, record.job_id


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
