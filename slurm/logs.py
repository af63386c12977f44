"""The log of what trains now, or of a segment by number.

    python -m slurm.logs run=NAME [stage=stage2] [segment=3] [lines=50] [follow=true]

Where nothing has begun, it says what the queue says. follow=true shows what comes, goes on with
the next segment of the stage, and ends when the stage is done or has failed; Slurm is asked only
after two silent minutes, whether anything is left to follow.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from conf.schema.errors import ConfigError
from slurm import arguments as words
from slurm import command_line
from slurm.job import LOG
from slurm.run_state import run_state
from slurm.status_text import text
from slurm.verify import DONE, FAILED, failure

KNOWN = {"run": "", "runs_dir": words.RUNS, "stage": "", "segment": "", "lines": "50", "follow": ""}
SECONDS = 0.5  # between two looks at the file
SILENT = 120.0  # seconds without output, before Slurm is asked whether anything is left
_BLOCK = 1 << 16


def find(root: Path, stage: str = "", segment: int | None = None) -> Path | None:
    """The log that is meant: of the segment, else of the newest one; None where none has begun.

    Raises ConfigError on a segment that does not exist.
    """
    if segment is not None:
        stages = [root / stage] if stage else [link.parent for link in _newest(root, "")]
        if not stages:
            raise ConfigError(f"{root} has no segments yet")
        log = stages[-1] / "segments" / f"{segment:03d}" / LOG
        if not log.parent.is_dir():
            there = sorted(path.name for path in log.parent.parent.glob("[0-9]*"))
            raise ConfigError(
                f"{log.parent} does not exist; {stages[-1].name} has segments "
                f"{', '.join(there) or 'none'}"
            )
        return log if log.exists() else None
    logs = _newest(root, stage)
    return logs[-1].resolve() if logs else None


def _newest(root: Path, stage: str) -> list[Path]:
    """current.log of every stage (or of `stage`) that has begun; the newest comes last."""
    logs = [
        directory / "current.log"
        for directory in sorted(root.glob("stage[0-9]*"))
        if directory.name == stage or not stage
    ]
    # By stage, then by time: a log may be written to when all is over.
    return sorted((log for log in logs if log.exists()), key=lambda log: os.lstat(log).st_mtime)


def tail(log: Path, lines: int, out: BinaryIO) -> int:
    """Copy the last `lines` lines to `out`; returns the offset of what comes after them."""
    with log.open("rb") as file:
        end = begin = file.seek(0, os.SEEK_END)
        data = b""
        # One more line break than lines, for the one at the very end.
        while begin > 0 and data.count(b"\n") <= lines:
            step = min(_BLOCK, begin)
            begin -= step
            file.seek(begin)
            data = file.read(step) + data
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    out.write(b"".join(kept))
    out.flush()
    return end


def follow(
    log: Path,
    offset: int,
    out: BinaryIO,
    is_over: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Copy what is added to `log` after `offset`, then to the logs of later segments.

    `is_over` is asked after each silent time; it is the only thing here that may ask Slurm.
    """
    stage_dir = log.parent.parent.parent
    heard = time.monotonic()
    while True:
        ended = (stage_dir / DONE).exists() or (stage_dir / FAILED).exists()
        current = stage_dir / "current.log"
        later = current.resolve() if current.exists() else log
        offset, came = _copy(log, offset, out)
        if came:
            heard = time.monotonic()
        elif later != log and later.parent.name > log.parent.name:
            say(f"==> {later} <==")
            log, offset = later, 0
        elif ended:
            say(_end(stage_dir))
            return
        elif time.monotonic() - heard > SILENT:
            if is_over():
                say(f"nothing of {stage_dir.name} runs or is queued any more")
                return
            heard = time.monotonic()
        else:
            time.sleep(SECONDS)


def _copy(log: Path, offset: int, out: BinaryIO) -> tuple[int, bool]:
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(offset if offset <= size else 0)  # truncated by somebody: from the beginning
            data = file.read()
            offset = file.tell()
    except FileNotFoundError:  # begins soon
        return 0, False
    out.write(data)
    out.flush()
    return offset, bool(data)


def _end(stage_dir: Path) -> str:
    if (stage_dir / DONE).exists():
        return f"{stage_dir.name} is done"
    return f"{stage_dir.name} failed: {failure(stage_dir)}"


def _is_over(root: Path, stage: str) -> bool:
    """Whether nothing is left of the stage that could still write; unknown counts as left."""
    state = run_state(root)
    found = [summary for summary in state.stages if summary.files.name == stage]
    return bool(found) and found[0].state not in ("running", "queued", "unknown", "not begun")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def logs(arguments: Sequence[str]) -> None:
    """Do what the command line asks. Raises ConfigError, OSError."""
    values = words.parse(arguments, KNOWN)
    root = words.run_directory(values)
    stage, lines = values["stage"], words.number(values, "lines")
    words.check_stage(root, stage)
    log = find(root, stage, words.number(values, "segment"))
    if log is None:
        print("nothing has begun, so there is no log yet")
        print(text(run_state(root)))
        return
    _say(f"==> {log} <==")
    out = sys.stdout.buffer
    offset = tail(log, 50 if lines is None else lines, out)
    if words.boolean(values, "follow"):
        name = log.parent.parent.parent.name
        follow(log, offset, out, lambda: _is_over(root, name), _say)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(logs, arguments, __doc__, needs_words=False)


if __name__ == "__main__":
    sys.exit(main())
