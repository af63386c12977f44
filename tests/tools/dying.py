"""Children of the tests' process that get a signal at their n-th change of the disk.

A fork has everything imported already, so that dozens of kills cost less than one start of Python.
"""

import builtins
import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What changes a file, a folder or what is known to be on disk. Each counts twice: before and after.
_CALLS = ("pwrite", "posix_fallocate", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def changes(action: Callable[[], Any], note: Path) -> int:
    """How many moments there are to die in `action`, which runs to its end in a child."""
    assert status(action, note=note) == 0, "the action itself fails"
    return int(note.read_text())


def status(
    action: Callable[[], Any],
    at: int = 0,
    signal_number: int = signal.SIGKILL,
    note: Path | None = None,
    after_s: float = 60,
) -> int:
    """Exit status of `action` in a child that sends itself a signal at its `at`-th change.

    Negative: the number of the signal that ended it. The child's own number of changes goes into
    `note`. After `after_s` seconds it is killed; by default that is where it hangs.
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            count = _count_changes(at, signal_number)
            code = int(action() or 0)
            if note:
                note.write_text(str(next(count) - 1))
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + after_s
    while True:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(raw)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def _count_changes(at: int, signal_number: int) -> "itertools.count[int]":
    count = itertools.count(1)

    def moment() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal_number)
            if signal_number == signal.SIGKILL:
                threading.Event().wait()  # it comes at once, but not before this line

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **named: Any) -> Any:
            moment()
            try:
                return call(*arguments, **named)
            finally:
                moment()

        return replacement

    for name in _CALLS:
        setattr(os, name, counted(getattr(os, name)))
    opened = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        call = counted(opened) if set(mode) & set("wax+") else opened
        return call(file, mode, *arguments, **named)

    io.open = builtins.open = opening  # type: ignore[assignment]
    return count
