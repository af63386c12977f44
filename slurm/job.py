"""A batch job as plain data, before and after it is submitted.

`chain.py` and `arrays.py` make jobs, `render.py` turns one into a script, `sbatch.py` submits it
and leaves a JobRecord beside the script; `status.py` and `cancel.py` read the records.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from slurm.files import write_text

SCRIPT, LOG, RECORD = "submit.sh", "log.out", "job.json"
KINDS = ("segment", "verify", "export", "array", "next_wave")
# Where a run keeps its jobs, one numbered folder each.
FOLDERS = ("stage*/segments", "stage*/verify", "export", "arrays/*")
_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One batch job.

    `after_ok` and `after_any` name jobs: a Job.name of the same submission, or the numeric id of a
    job that is queued already.
    """

    name: str  # Slurm's job name, also the key by which other jobs depend on it
    kind: str
    directory: Path  # absolute; holds submit.sh, job.json and log.out
    body: str  # shell lines after the site's setup
    hours: float
    nodes: int = 1
    ranks_per_node: int = 1  # ntasks-per-node
    gpus_per_node: int = 0
    cpus_per_rank: int | None = None
    exclusive: bool = False
    stage: str = ""
    number: int = 0  # of the segment, or of the wave of an array
    after_ok: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    elements: int | None = None  # of an array
    throttle: int | None = None  # most elements that run at once
    signal_seconds: int = 60  # USR2 to the ranks so long before the walltime ends

    @property
    def script(self) -> Path:
        return self.directory / SCRIPT


@dataclass(frozen=True)
class JobRecord:
    """job.json: what was submitted. Times are seconds since 1970."""

    job_id: str
    name: str
    kind: str
    stage: str
    number: int
    directory: str
    cluster: str
    nodes: int
    gpus: int  # of all its nodes (one element's, for an array)
    hours: float
    dependency: str
    submitted: float
    code: str  # SHA-256 of the snapshot
    elements: int | None = None
    throttle: int | None = None

    def write(self) -> None:
        """Beside the script, atomically."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        write_text(Path(self.directory) / RECORD, text + "\n")


def read_record(path: Path) -> JobRecord:
    """Parse a job.json. Raises ConfigError naming the file when it is damaged."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != _FORMAT:
            raise ValueError(f"another format than {_FORMAT}")
        return JobRecord(**value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); cancel its job by hand if it is queued, and remove the "
            "file"
        ) from error


def records(run: Path) -> Iterator[JobRecord]:
    """Every submitted job of a run, in the order of submission."""
    paths = [path for folder in FOLDERS for path in run.glob(f"{folder}/[0-9]*/{RECORD}")]
    found = [read_record(path) for path in paths]
    yield from sorted(found, key=lambda record: (record.submitted, record.job_id))
