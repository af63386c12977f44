"""What a segment decides before and after its ranks run.

    python -m slurm.segment begin STAGE_DIR SEGMENT_DIR
    python -m slurm.segment end STAGE_DIR SEGMENT_DIR --code CODE [--terminated]
    python -m slurm.segment verify STAGE_DIR

The batch script calls these around srun, the local executor calls the functions. Only the standard
library, PyYAML and small modules: it must start at once, also on a slow file system.
"""

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.node_list import expand
from conf.schema.errors import ConfigError
from conf.snapshot import difference
from slurm import attempts as history
from slurm import exclude, preflight_report, segment_jobs
from slurm.attempts import Attempt
from slurm.files import point, write_text
from slurm.job import LOG, RECORD, read_record
from slurm.log_cause import cause
from slurm.verify import DONE, FAILED, refusal, verify

__all__ = ["AGAIN", "NOTHING_TO_DO", "begin", "end", "verify"]

NOTHING_TO_DO = 3  # of `begin`: the stage is done
AGAIN = 75  # of `end`: start the ranks again in this job (EX_TEMPFAIL of sysexits.h)
OWNER = "OWNER"  # which attempt may write in the stage directory; pipeline.callbacks.fence reads it
# Ranks that were asked to stop; 128 + signal also where one came before Python could handle it.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED_CODES = tuple(128 + int(number) for number in _STOPS)


def begin(stage_dir: Path, segment_dir: Path, environment: Mapping[str, str] | None = None) -> int:
    """May the ranks start? 0: yes; 3: the stage is done; 1: no, and stderr says why.

    Closes what was killed before, points current.log here, makes this attempt (ATTEMPT_ID) the
    owner of the stage directory and records its start. Raises ConfigError and OSError.
    """
    environment = os.environ if environment is None else environment
    stage = stage_dir.name
    if (stage_dir / DONE).exists():
        _say(stage_dir, segment_dir, f"{stage} is done already, nothing to do")
        return NOTHING_TO_DO
    reason = refusal(stage_dir)
    if reason is None:
        reason = difference(stage_dir.parent)
    if reason is not None:
        print(f"error: {stage} does not start: {reason}", file=sys.stderr, flush=True)
        return 1
    before = _close_stale(stage_dir, history.read(stage_dir))
    started = _attempt(segment_dir, environment, history.steps_reached(stage_dir, before))
    point(stage_dir / "current.log", Path("segments") / segment_dir.name / LOG)
    owner = {"attempt": started.attempt, "job": started.job_id, "time": started.started}
    write_text(stage_dir / OWNER, json.dumps(owner) + "\n")
    history.append_start(stage_dir, started)
    where = f" on {environment['SLURM_JOB_NODELIST']}" if started.job_id else ""
    after = f", step {started.step} reached before" if started.step else ""
    _say(stage_dir, segment_dir, f"attempt {len(before) + 1} of {stage} begins{where}{after}")
    return 0


def end(
    stage_dir: Path,
    segment_dir: Path,
    code: int,
    terminated: bool = False,
    environment: Mapping[str, str] | None = None,
    restarts: int | None = None,
) -> int:
    """The ranks have ended with `code`: record it and decide.

    Args:
        terminated: the batch shell was asked to end; its ranks are not started again.
        restarts: in the same job; by default `cluster.restarts` in Slurm, else none.

    Returns 0 (done, or saved and stopped), 75 (start the ranks again), or what the job ends with.
    Raises ConfigError and OSError.
    """
    environment = os.environ if environment is None else environment
    past = history.read(stage_dir)
    mine = _open_attempt(past, segment_dir, environment)
    if mine is None:
        _say(stage_dir, segment_dir, "another job has taken over this stage; nothing is decided")
        return code or 1
    reached = history.steps_reached(stage_dir, past)
    ended = replace(mine, ended=round(time.time(), 3), code=code, reached=reached)
    if (stage_dir / DONE).exists():
        history.append_end(stage_dir, replace(ended, outcome="done"))
        _say(stage_dir, segment_dir, f"{stage_dir.name} is done after step {reached}")
        segment_jobs.cancel_later(stage_dir, segment_dir)
        return 0
    if terminated or code in STOPPED_CODES:
        history.append_end(stage_dir, replace(ended, outcome="stopped"))
        preempted = segment_jobs.was_preempted(ended.job_id)
        goes_on = "this preempted job, queued again," if preempted else "the next segment"
        _say(stage_dir, segment_dir, f"stopped after step {reached}; {goes_on} goes on")
        if preempted:
            segment_jobs.requeue(ended.job_id)
        return 0
    return _failed(stage_dir, segment_dir, past, ended, environment, restarts)


def _failed(
    stage_dir: Path,
    segment_dir: Path,
    past: Sequence[Attempt],
    ended: Attempt,
    environment: Mapping[str, str],
    restarts: int | None,
) -> int:
    code = ended.code or 1  # 0 without DONE.json is no success either
    named = preflight_report.blamed(segment_dir / "preflight", ended.attempt, ended.nodes)
    new = _exclude(stage_dir.parent, named, ended.job_id)
    if new:
        reason = "; ".join(f"{node}: {named[node]}" for node in new)
        history.append_end(stage_dir, replace(ended, outcome="bad_node", reason=reason))
        _say(stage_dir, segment_dir, f"bad node, avoided from now on: {reason}")
        segment_jobs.avoid(stage_dir, exclude.read(stage_dir.parent), ended.job_id)
        return code
    reason = cause(segment_dir / LOG, ended.log_bytes)
    failed = replace(ended, outcome="failed", reason=reason)
    others = [attempt for attempt in past if attempt.attempt != ended.attempt]
    if history.stuck([*others, failed]):
        _give_up(stage_dir, segment_dir, [*others, failed])
        history.append_end(stage_dir, replace(failed, gave_up=True))
        segment_jobs.cancel_later(stage_dir, segment_dir)
        return code
    history.append_end(stage_dir, failed)
    if _may_start_again(stage_dir, past, ended, environment, restarts):
        _say(stage_dir, segment_dir, f"failed (exit code {code}): {reason}; starting again")
        return AGAIN
    _say(stage_dir, segment_dir, f"failed (exit code {code}): {reason}; {_heir(ended)} goes on")
    return code


def _give_up(stage_dir: Path, segment_dir: Path, attempts: Sequence[Attempt]) -> None:
    """FAILED.json: what whoever looks into it needs to know."""
    last = attempts[-1]
    reason = (
        f"{history.FRUITLESS} attempts failed without a step beyond {last.reached}, the last one "
        f"with exit code {last.code}: {last.reason}"
    )
    value = {
        "format": 1,
        "reason": reason,
        "code": last.code,
        "log_line": last.reason,
        "log": str(segment_dir / LOG),
        "step": last.reached,
        "time": last.ended,
        "attempts": [attempt.attempt for attempt in attempts],
    }
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_text(stage_dir / FAILED, text + "\n")
    _say(stage_dir, segment_dir, f"{stage_dir.name} gives up: {reason}")


def _may_start_again(
    stage_dir: Path,
    past: Sequence[Attempt],
    ended: Attempt,
    environment: Mapping[str, str],
    restarts: int | None,
) -> bool:
    """Whether restarts of this job are left, and time in which one is worth it."""
    cluster = segment_jobs.cluster_settings(stage_dir)
    if restarts is None:
        restarts = int(cluster.get("restarts") or 0) if ended.job_id else 0
    here = [a for a in past if (a.job_id, a.restart) == (ended.job_id, ended.restart)]
    if len([a for a in here if a.segment == ended.segment]) > restarts:
        return False
    if not ended.job_id:
        return True
    now = time.time()
    stop = 60 * float(cluster.get("stop_minutes") or 0)
    hours = float(cluster.get("hours") or 0)
    limit = environment.get("SLURM_JOB_END_TIME", "")
    end_time = float(limit) if limit.isdigit() else here[0].started + hours * 3600
    return end_time - now > 2 * stop


def _exclude(run_dir: Path, named: Mapping[str, str], job_id: str) -> list[str]:
    """Add to exclude_nodes.json; a damaged one must not hide why the ranks failed."""
    try:
        return exclude.add(run_dir, named, job_id)
    except ConfigError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return []


def _close_stale(stage_dir: Path, attempts: list[Attempt]) -> list[Attempt]:
    """End what has no end: its job was killed, requeued, or lost its node."""
    closed = []
    for attempt in attempts:
        if attempt.ended is None:
            killed = replace(
                attempt,
                ended=_last_sign(stage_dir, attempt),
                outcome="killed",
                reached=history.steps_reached(stage_dir, attempts),
                reason="killed without an end (requeue, lost node, cancelled or out of time)",
            )
            history.append_end(stage_dir, killed)
            attempt = killed
        closed.append(attempt)
    return closed


def _last_sign(stage_dir: Path, attempt: Attempt) -> float:
    """When the attempt last wrote something: about when it was killed."""
    signs = [attempt.started]
    for path in (stage_dir / "segments" / attempt.segment / LOG, stage_dir / "metrics.jsonl"):
        if path.is_file():
            signs.append(path.stat().st_mtime)
    return round(min(max(signs), max(time.time(), attempt.started)), 3)


def _attempt(segment_dir: Path, environment: Mapping[str, str], step: int) -> Attempt:
    now = time.time()
    listed = environment.get("SLURM_JOB_NODELIST", "")
    log = segment_dir / LOG
    return Attempt(
        attempt=environment.get("ATTEMPT_ID") or f"{socket.gethostname()}-{os.getpid()}-{now:.3f}",
        segment=segment_dir.name,
        started=round(now, 3),
        step=step,
        job_id=environment.get("SLURM_JOB_ID", ""),
        restart=_number(environment.get("SLURM_RESTART_COUNT", "")),
        nodes=tuple(expand(listed)) if listed else (socket.gethostname(),),
        gpus=_gpus(segment_dir, environment),
        log_bytes=log.stat().st_size if log.is_file() else 0,
    )


def _gpus(segment_dir: Path, environment: Mapping[str, str]) -> int:
    """GPUs of the whole job, as submitted, else as Slurm says."""
    if (segment_dir / RECORD).is_file():
        return read_record(segment_dir / RECORD).gpus
    nodes = _number(environment.get("SLURM_JOB_NUM_NODES", "")) or 1
    return nodes * _number(environment.get("SLURM_GPUS_ON_NODE", ""))


def _open_attempt(
    attempts: Sequence[Attempt], segment_dir: Path, environment: Mapping[str, str]
) -> Attempt | None:
    """This start of the ranks, unless it was closed, or another began since."""
    name = environment.get("ATTEMPT_ID")
    if not attempts:
        # The record is gone; ended as if it had begun just now.
        return _attempt(segment_dir, environment, 0)
    last = attempts[-1]
    ours = last.attempt == name if name else last.segment == segment_dir.name
    return last if ours and last.ended is None else None


def _heir(attempt: Attempt) -> str:
    """What goes on where it ended; outside Slurm nothing is queued behind it."""
    return "the next segment" if attempt.job_id else "the same command"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _say(stage_dir: Path, segment_dir: Path, message: str) -> None:
    print(f"[{stage_dir.name}] segment {segment_dir.name}: {message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.segment", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end", "verify"):
        command = commands.add_parser(name)
        command.add_argument("stage_dir", type=Path)
        if name != "verify":
            command.add_argument("segment_dir", type=Path)
        if name == "end":
            command.add_argument("--code", type=int, required=True)
            command.add_argument("--terminated", action="store_true")
    given: Any = parser.parse_args(arguments)
    try:
        if given.command == "begin":
            return begin(given.stage_dir, given.segment_dir)
        if given.command == "end":
            return end(given.stage_dir, given.segment_dir, given.code, given.terminated)
        reason = verify(given.stage_dir)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            return 1
        print(f"{given.stage_dir} is done and its checkpoint is whole", flush=True)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return getattr(given, "code", 0) or 1


if __name__ == "__main__":
    sys.exit(main())
