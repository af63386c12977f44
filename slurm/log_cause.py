"""The line of a segment's log that says why its ranks failed."""

import re
from pathlib import Path

_TAIL_BYTES = 1 << 16
_LONGEST = 500
_LABEL = re.compile(r"^\s*\d+: ")  # srun --label
# What Slurm adds when a rank has failed already.
_SLURM = re.compile(r"^(srun|slurmstepd|slurmd|mpiexec)[:-]|^\*\*\*|^In: PMI")
_ERROR = re.compile(r"^(error: |\w*(Error|Exception|Interrupt)\b.*:|.*\b(Segmentation|Killed)\b)")


def cause(log: Path, begin: int = 0) -> str:
    """The last line from byte `begin` that reads like an error, else the last that says anything.

    Slurm's own words about the end of its tasks count only where there are no others.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(begin if begin <= size else 0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    return cause_in(text)


def cause_in(text: str) -> str:
    """As `cause`, of the text of a log."""
    lines = [_LABEL.sub("", line).strip() for line in text.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line]
    own = [line for line in lines if not _SLURM.match(line)]
    for line in reversed(own):
        if _ERROR.match(line):
            return line[:_LONGEST]
    return (own or lines or ["it said nothing"])[-1][:_LONGEST]
