"""Slurm's programs: the only place that starts them.

Every call has a timeout, a plain environment (C locale, times as seconds since 1970, none of the
user's SQUEUE_, SACCT_ or SBATCH_ variables, which change what comes out or what is asked for) and
raises SlurmError, one line with a remedy.  Works with Slurm 22.05 and later.
"""

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from slurm.answers import (
    FIELD,
    SACCT_FIELDS,
    SINFO_FORMAT,
    SQUEUE_FORMAT,
    AccountedJob,
    NodeRow,
    QueuedJob,
    parse_sacct,
    parse_sinfo,
    parse_squeue,
)
from slurm.errors import SlurmError, failure, one_line

__all__ = ["AccountedJob", "NodeRow", "QueuedJob", "SlurmError"]

TIMEOUT = 30.0  # seconds; a busy controller answers in one
_FINISHED = ("Invalid job id", "already completing", "already completed", "already finished")


def run(words: Sequence[str], timeout: float = TIMEOUT) -> str:
    """What a Slurm program prints. Raises SlurmError."""
    return _run(words, timeout, _plain_environment())


def squeue(user_only: bool = True, user: str | None = None) -> list[QueuedJob]:
    """The jobs of this user (or of `user`, or of everybody), in one call."""
    words = ["squeue", "-h", "-r", "-t", "all", "-o", SQUEUE_FORMAT]
    if user is not None:
        words += ["-u", user]
    elif user_only:
        words += ["--me"]
    return parse_squeue(run(words))


def sacct(ids: Iterable[str]) -> dict[str, AccountedJob] | None:
    """Jobs by key, in one call; None where accounting is off, denied or down."""
    wanted = ",".join(dict.fromkeys(ids))
    if not wanted:
        return {}
    words = ["sacct", "-n", "-P", "-X", "-D", f"--delimiter={FIELD}", "-j", wanted]
    try:
        return parse_sacct(run([*words, f"--format={','.join(SACCT_FIELDS)}"]))
    except SlurmError:
        return None


def sbatch(script: Path, extra: Sequence[str] = ()) -> str:
    """Submit a script; returns the job's id. Raises SlurmError with sbatch's own words."""
    answer = _run(["sbatch", "--parsable", *extra, str(script)], TIMEOUT, _job_environment())
    job_id = answer.strip().split("\n")[-1].partition(";")[0]  # ";cluster" on some sites
    if not job_id.isdigit():
        raise SlurmError(f"sbatch printed {answer.strip()[:80]!r} instead of a job's id")
    return job_id


def test_only(script: Path, extra: Sequence[str] = ()) -> str:
    """What `sbatch --test-only` says of a script: when and where it would start."""
    words = ["sbatch", "--test-only", *extra, str(script)]
    done = _start(words, TIMEOUT, _job_environment())
    if done.returncode:
        raise failure(words[0], done.stderr or done.stdout)
    return one_line(done.stderr or done.stdout).removeprefix("sbatch: ")


def scancel(
    ids: Iterable[str],
    signal: str | None = None,
    batch: bool = False,
    pending_only: bool = False,
) -> None:
    """Cancel jobs; those that are gone are no error. Raises SlurmError.

    Args:
        signal: send it to the ranks instead; with `batch` to the batch shell instead of them.
        pending_only: leave those that have begun meanwhile.
    """
    wanted = list(ids)
    if not wanted:
        return
    words = ["scancel"]
    words += [f"--signal={signal}"] if signal else []
    words += ["--batch"] if batch else []
    words += ["--state=PENDING"] if pending_only else []
    done = _start([*words, *wanted], TIMEOUT, _plain_environment())
    problems = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and not any(text in line for text in _FINISHED)
    ]
    if done.returncode and problems:
        raise failure("scancel", "\n".join(problems))


def hold(*job_ids: str) -> None:
    """Keep pending jobs from starting."""
    run(["scontrol", "hold", ",".join(job_ids)])


def release(job_id: str) -> None:
    """Let a held job start."""
    run(["scontrol", "release", job_id])


def requeue(job_id: str) -> None:
    """End a running job and queue it again."""
    run(["scontrol", "requeue", job_id])


def update(job_id: str, **fields: str) -> None:
    """Change a queued job: `update("123", ExcNodeList="as01")`."""
    words = [f"{name}={value}" for name, value in fields.items()]
    run(["scontrol", "update", f"JobId={job_id}", *words])


def sinfo_rows() -> list[NodeRow]:
    """Every partition's nodes, a row a shape. Raises SlurmError, also where sinfo is denied."""
    return parse_sinfo(run(["sinfo", "-h", "-o", SINFO_FORMAT]))


def show_partition() -> list[dict[str, str]]:
    """`scontrol show partition`: a dictionary of its words for each. Raises SlurmError."""
    lines = run(["scontrol", "--oneliner", "show", "partition"]).splitlines()
    return [_words(line) for line in lines if line.startswith("PartitionName=")]


def show_config() -> dict[str, str]:
    """`scontrol show config`: MaxArraySize, SLURM_VERSION, ... Raises SlurmError."""
    pairs = (line.split("=", 1) for line in run(["scontrol", "show", "config"]).splitlines())
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def _run(words: Sequence[str], timeout: float, environment: Mapping[str, str]) -> str:
    done = _start(words, timeout, environment)
    if done.returncode:
        raise failure(words[0], done.stderr or done.stdout)
    return done.stdout


def _start(
    words: Sequence[str], timeout: float, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    program = words[0]
    try:
        return subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=dict(environment),
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"{program} is not on PATH: this machine has no Slurm; use a login node of the "
            "cluster, or CLUSTER=local",
            "missing",
        ) from error
    except PermissionError as error:
        raise SlurmError(f"{program} may not be used by you on this machine", "denied") from error
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        hint = f" ({one_line(said)})" if said else ""
        raise SlurmError(
            f"{program} gave no answer in {timeout:.0f} s{hint}; Slurm's controller may be down or "
            "overloaded: wait a minute and give the same command",
            "unreachable",
        ) from error


def _plain_environment() -> dict[str, str]:
    return {**_job_environment(), "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}


def _job_environment() -> dict[str, str]:
    """The caller's, less what would change a script's options or leak from an outer job."""
    prefixes = (
        "SLURM_",
        "SBATCH_",
        "SRUN_",
        "SQUEUE_",
        "SACCT_",
        "SINFO_",
        "SCANCEL_",
        "SCONTROL_",
    )
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(prefixes) or name in ("SLURM_CONF", "SLURM_CONF_SERVER")
    }


def _words(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
