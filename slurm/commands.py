"""Slurm's programs: the only place that starts them.

Every call has a timeout, a plain environment (C locale, times as seconds since 1970, none of the
user's SQUEUE_, SACCT_ or SBATCH_ variables, which change what comes out or what is asked for) and
raises SlurmError, one line with a remedy.  Works with Slurm 22.05 and later.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema.errors import ConfigError

TIMEOUT = 30.0  # seconds; a busy controller answers in one
# Control characters that no site's names hold; text that users choose (name, comment) comes last.
_FIELD, _ROW = "\x1f", "\x1e"
_FINISHED = ("Invalid job id", "already completing", "already completed", "already finished")

# What the programs say -> what has gone wrong, and what to do. The first that fits counts.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"accounting storage is disabled|slurm_persist_conn|database|slurmdbd",
        "accounting",
        "this Slurm keeps no accounting records, or its database is down",
    ),
    (
        r"munge|Protocol authentication error|auth_g_create",
        "munge",
        "munge does not run on this machine; try another login node, or tell the operators",
    ),
    (
        r"Unable to contact slurm controller|Connection (refused|timed out)|Socket timed out"
        r"|Zero Bytes|Unable to establish",
        "unreachable",
        "Slurm's controller does not answer; wait a minute and give the same command",
    ),
    (
        r"Unable to process configuration file|cannot stat file|ClusterName needs",
        "configuration",
        "this machine has Slurm's programs but no cluster; use a login node, or set SLURM_CONF",
    ),
    (r"Invalid account", "account", "give an account that is yours in SLURM_ACCOUNT"),
    (r"Invalid qos", "qos", "give a QoS that your account may use in SLURM_QOS"),
    (
        r"[Ii]nvalid partition|partition .*not available",
        "partition",
        "set cluster.partition to one that `sinfo` lists",
    ),
    (
        r"violates accounting/QOS policy|QOS\w*(Max|Limit)|Assoc\w*(Max|Limit)|limit",
        "limits",
        "ask for less (nodes, hours, jobs), or for another QoS in SLURM_QOS",
    ),
    (
        r"[Pp]ermission denied|Access.denied|not permitted|[Uu]ser.*not allowed",
        "denied",
        "the job belongs to somebody else, or the site forbids this program",
    ),
    (
        r"Requested node configuration is not available|More processors requested",
        "shape",
        "no node has what a job asks for; compare cluster.* with `sinfo`",
    ),
    (r"Invalid job id", "job", "Slurm has forgotten this job"),
)


class SlurmError(ConfigError):
    """A Slurm program that failed; `cause` is one word (missing, unreachable, munge, ...)."""

    def __init__(self, message: str, cause: str = "other") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class QueuedJob:
    """A job that squeue shows; finished ones remain visible for the site's MinJobAge.

    Times are seconds since 1970. Elements of an array are a job each, with the array's job_id.
    """

    job_id: str  # as sbatch printed it
    array_index: int | None
    name: str
    state: str  # PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, ...
    reason: str  # Slurm's word, "None" where there is none
    comment: str
    user: str
    partition: str
    submitted: float | None
    start: float | None  # an estimate while the job is pending
    used: float  # seconds
    left: float | None  # seconds; None where there is no limit
    nodes: int
    node_list: str
    dependency: str

    @property
    def key(self) -> str:
        """What scancel takes: "123", or "123_4" for an element of an array."""
        return self.job_id if self.array_index is None else f"{self.job_id}_{self.array_index}"

    @property
    def is_live(self) -> bool:
        """Whether it still waits, runs, or will run again."""
        return self.state in LIVE_STATES


LIVE_STATES = frozenset(
    "PENDING RUNNING COMPLETING CONFIGURING SUSPENDED REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING "
    "SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED RESV_DEL_HOLD".split()
)


@dataclass(frozen=True)
class AccountedJob:
    """What the accounting database knows of a job, every start of it taken together."""

    key: str  # "123", or "123_4" for an element of an array
    name: str
    state: str
    exit_code: str  # "1:0"
    start: float | None  # of the newest start, seconds since 1970
    end: float | None
    seconds: float  # elapsed, summed over its starts
    gpu_seconds: float
    nodes: int
    starts: int  # 1 + requeues


@dataclass(frozen=True)
class NodeRow:
    """Nodes of one shape in one partition, as sinfo shows them."""

    partition: str
    is_default: bool
    is_up: bool
    time_limit: str  # "3-00:00:00", "infinite"
    nodes: int
    sockets: int
    cores: int  # of a socket
    threads: int  # of a core
    memory_mb: int
    gres: str  # "gpu:4", "gpu:h100:4(S:0-3)", ""
    features: str
    state: str  # idle, mixed, allocated, down*, ...


def run(words: Sequence[str], timeout: float = TIMEOUT) -> str:
    """What a Slurm program prints. Raises SlurmError."""
    return _run(words, timeout, _plain_environment())


def squeue(user_only: bool = True, user: str | None = None) -> list[QueuedJob]:
    """The jobs of this user (or of `user`, or of everybody), in one call."""
    words = ["squeue", "-h", "-r", "-t", "all", "-o", _SQUEUE_FORMAT]
    if user is not None:
        words += ["-u", user]
    elif user_only:
        words += ["--me"]
    return parse_squeue(run(words))


_SQUEUE_FORMAT = _ROW + _FIELD.join("%F %K %T %r %u %P %V %S %M %L %D %N %E %j %k".split())


def parse_squeue(text: str) -> list[QueuedJob]:
    """Parse what `squeue` was asked for. Raises SlurmError where it is something else."""
    jobs = []
    for row in text.split(_ROW)[1:]:
        fields = row.removesuffix("\n").split(_FIELD, 14)
        if len(fields) != 15 or not fields[0].isdigit():
            raise SlurmError(f"squeue printed {row[:80]!r}, which is not what it was asked for")
        index = fields[1]
        jobs.append(
            QueuedJob(
                job_id=fields[0],
                array_index=int(index) if index.isdigit() else None,
                state=fields[2],
                reason=fields[3],
                user=fields[4],
                partition=fields[5],
                submitted=_time(fields[6]),
                start=_time(fields[7]),
                used=_duration(fields[8]) or 0.0,
                left=_duration(fields[9]),
                nodes=_count(fields[10]),
                node_list=_text(fields[11]),
                dependency=_text(fields[12]),
                name=fields[13],
                comment=_text(fields[14]),
            )
        )
    return jobs


_SACCT_FIELDS = "JobID JobName State ExitCode Start End ElapsedRaw NNodes AllocTRES".split()


def sacct(ids: Iterable[str]) -> dict[str, AccountedJob] | None:
    """Jobs by key, in one call; None where accounting is off, denied or down."""
    wanted = ",".join(dict.fromkeys(ids))
    if not wanted:
        return {}
    words = ["sacct", "-n", "-P", "-X", "-D", f"--delimiter={_FIELD}", "-j", wanted]
    try:
        return parse_sacct(run([*words, f"--format={','.join(_SACCT_FIELDS)}"]))
    except SlurmError:
        return None


def parse_sacct(text: str) -> dict[str, AccountedJob]:
    """Parse what `sacct` was asked for; lines that are something else are passed over."""
    jobs: dict[str, AccountedJob] = {}
    for line in text.split("\n"):
        fields = line.split(_FIELD)
        if len(fields) < len(_SACCT_FIELDS) or not fields[0][:1].isdigit():
            continue
        key, name = fields[0], _FIELD.join(fields[1:-7])
        state, exit_code, start, end, elapsed, nodes, tres = fields[-7:]
        seconds = float(elapsed) if elapsed.isdigit() else 0.0
        gpus = re.search(r"gres/gpu=(\d+)", tres)
        before = jobs.get(key)
        jobs[key] = AccountedJob(
            key=key,
            name=name,
            state=state.split(" ")[0],  # "CANCELLED by 1000"
            exit_code=exit_code,
            start=_time(start),
            end=_time(end),
            seconds=seconds + (before.seconds if before else 0.0),
            gpu_seconds=seconds * int(gpus[1] if gpus else 0)
            + (before.gpu_seconds if before else 0.0),
            nodes=_count(nodes),
            starts=1 + (before.starts if before else 0),
        )
    return jobs


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
        raise _failure(words[0], done.stderr or done.stdout)
    return _one_line(done.stderr or done.stdout).removeprefix("sbatch: ")


def scancel(ids: Iterable[str], signal: str | None = None) -> None:
    """Cancel jobs, or signal their ranks (not the batch shell); those that are gone are no error.

    Raises SlurmError.
    """
    wanted = list(ids)
    if not wanted:
        return
    words = ["scancel", *([f"--signal={signal}"] if signal else []), *wanted]
    done = _start(words, TIMEOUT, _plain_environment())
    problems = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and not any(text in line for text in _FINISHED)
    ]
    if done.returncode and problems:
        raise _failure("scancel", "\n".join(problems))


def hold(job_id: str) -> None:
    """Keep a pending job from starting."""
    run(["scontrol", "hold", job_id])


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
    layout = _ROW + _FIELD.join("%R %P %a %l %D %X %Y %Z %m %G %f %T".split())
    rows = []
    for row in run(["sinfo", "-h", "-o", layout]).split(_ROW)[1:]:
        fields = row.removesuffix("\n").split(_FIELD)
        if len(fields) != 12:
            raise SlurmError(f"sinfo printed {row[:80]!r}, which is not what it was asked for")
        rows.append(
            NodeRow(
                partition=fields[0],
                is_default=fields[1].endswith("*"),
                is_up=fields[2] == "up",
                time_limit=fields[3],
                nodes=_count(fields[4]),
                sockets=_count(fields[5]),
                cores=_count(fields[6]),
                threads=_count(fields[7]),
                memory_mb=_count(fields[8]),
                gres=_text(fields[9]),
                features=_text(fields[10]),
                state=fields[11],
            )
        )
    return rows


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
        raise _failure(words[0], done.stderr or done.stdout)
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
        hint = f" ({_one_line(said)})" if said else ""
        raise SlurmError(
            f"{program} gave no answer in {timeout:.0f} s{hint}; Slurm's controller may be down or "
            "overloaded: wait a minute and give the same command",
            "unreachable",
        ) from error


def _failure(program: str, said: str) -> SlurmError:
    line = _one_line(said) or "it failed without a word"
    for pattern, cause, remedy in _CAUSES:
        if re.search(pattern, said):
            return SlurmError(f"{program}: {line}; {remedy}", cause)
    return SlurmError(f"{program}: {line}")


def _one_line(said: str) -> str:
    """The program's own words, prefixes off; what it says several times once."""
    lines = [
        re.sub(r"^\w+: (error|fatal|warning): ", "", line.strip()) for line in said.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))[:500]


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


def _text(value: str) -> str:
    return "" if value in ("(null)", "N/A") else value


def _time(value: str) -> float | None:
    """Seconds since 1970, which SLURM_TIME_FORMAT asks for; "N/A" and "Unknown" are None."""
    return float(value) if value.isdigit() and int(value) > 0 else None


def _count(value: str) -> int:
    """ "4", "4+" (at least four), "1.5K"."""
    found = re.match(r"(\d+(?:\.\d+)?)([KMG]?)", value)
    if found is None:
        return 0
    return round(float(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[2]])


def _duration(value: str) -> float | None:
    """ "2-23:59:59", "1:05:00" or "0:07" in seconds; None for UNLIMITED, INVALID, NOT_SET."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", value.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
