"""What squeue, sacct and sinfo print, parsed.

The programs are asked for fields between control characters that no site's names hold; text that
users choose (job name, comment) comes last, for it may hold anything.
"""

import re
from dataclasses import dataclass

from slurm.errors import SlurmError

FIELD, _ROW = "\x1f", "\x1e"
SQUEUE_FORMAT = _ROW + FIELD.join("%F %K %T %r %u %P %V %S %M %L %D %N %E %j %k".split())
SACCT_FIELDS = "JobID JobName State ExitCode Start End ElapsedRaw NNodes AllocTRES".split()
SINFO_FORMAT = _ROW + FIELD.join("%R %P %a %l %D %X %Y %Z %m %G %f %T".split())


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
        return self.state in _LIVE


_LIVE = frozenset(
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


def parse_squeue(text: str) -> list[QueuedJob]:
    """Parse what `squeue` was asked for. Raises SlurmError where it is something else."""
    jobs = []
    # A name may hold even the separator; id, index and state follow a true one.
    rows = re.split(rf"{_ROW}(?=\d+{FIELD}[^{FIELD}]*{FIELD}[A-Z_]+{FIELD})", text)
    if rows[0].strip():
        raise SlurmError(f"squeue printed {rows[0][:80]!r}, which is not what it was asked for")
    for row in rows[1:]:
        fields = row.removesuffix("\n").split(FIELD, 14)
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


def parse_sacct(text: str) -> dict[str, AccountedJob]:
    """Parse what `sacct` was asked for; lines that are something else are passed over."""
    jobs: dict[str, AccountedJob] = {}
    for line in text.split("\n"):
        fields = line.split(FIELD)
        if len(fields) < len(SACCT_FIELDS) or not fields[0][:1].isdigit():
            continue
        key, name = fields[0], FIELD.join(fields[1:-7])
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


def parse_sinfo(text: str) -> list[NodeRow]:
    """Parse what `sinfo` was asked for. Raises SlurmError where it is something else."""
    rows = []
    for row in text.split(_ROW)[1:]:
        fields = row.removesuffix("\n").split(FIELD)
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
