"""Which processes belong to a throw-away Slurm, found by their environment in /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path


def environment(pid: int) -> dict[str, str]:
    """Environment with which a process began; empty when it is gone or not ours to see."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def identity(pid: int) -> str:
    """Process id and start time: what no later process has. "" when it is gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return f"{pid} {text.rpartition(')')[2].split()[19]}"
    return ""


def parent(pid: int) -> int:
    """Parent's process id; 0 when the process is gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[1])
    return 0


def command(pid: int) -> str:
    """Command line, or "" when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""


def pids() -> Iterator[int]:
    """Every process of this machine."""
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def kill(chosen: Iterable[int], timeout: float = 10) -> None:
    """kill -9 and wait until they are gone. AssertionError when one stays."""
    left = [pid for pid in chosen if alive(pid)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + timeout
    while left := [pid for pid in left if alive(pid)]:
        assert time.monotonic() < end, f"cannot kill {[(pid, command(pid)) for pid in left]}"
        time.sleep(0.01)
