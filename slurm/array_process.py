"""One item's process: started, watched, its output passed on, its last line kept."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from slurm.array_items import Item
from slurm.local import die_with_parent
from slurm.log_cause import cause_in

TAIL_BYTES = 1 << 14  # of an item's output, to find the line in that tells
LAST_LINE = 500  # characters
DRAIN_SECONDS = 5.0  # for output that comes after an item's end
CANNOT_START = 126  # the shell's code


@dataclass(frozen=True)
class Ending:
    """How an item ended."""

    code: int  # as the shell has it: 128 + N after signal N
    said: str  # its last line, or the one that says why it failed


@dataclass
class Processes:
    """Those that run now. Safe to use from several threads."""

    _running: set["subprocess.Popen[bytes]"] = field(default_factory=set)

    def run(self, item: Item, log: BinaryIO | None = None) -> Ending:
        """`python -m WORDS`, or the item's shell line, to its end.

        Its output goes to ours as it comes, and to `log`.
        """
        command = ["bash", "-c", item.shell] if item.shell else [sys.executable, "-m", *item.words]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is for this process, which lets the item end; but an item
                # must not outlive it.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        except OSError as error:
            return Ending(CANNOT_START, f"cannot be started: {error}")
        self._running.add(process)
        tail = bytearray()
        assert process.stdout is not None
        outputs: list[Callable[[bytes], object]] = [_to_terminal]
        if log is not None:
            outputs.append(log.write)
        reader = threading.Thread(
            target=_copy, args=(process.stdout.fileno(), tail, outputs), daemon=True
        )
        reader.start()
        code = process.wait()
        self._running.discard(process)
        reader.join(timeout=DRAIN_SECONDS)  # what it left behind may hold the pipe open
        code = code if code >= 0 else 128 - code
        text = bytes(tail).decode("utf-8", errors="replace")
        return Ending(code, last_line(text) if code in item.accepted else cause_in(text))

    def terminate(self) -> None:
        """Ask every item in progress to end."""
        for process in list(self._running):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


def _copy(descriptor: int, tail: bytearray, outputs: list[Callable[[bytes], object]]) -> None:
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:
            return
        if not data:
            return
        tail += data
        del tail[:-TAIL_BYTES]
        for output in outputs:
            with suppress(OSError, ValueError):  # a full disk must not block the item
                output(data)


def _to_terminal(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def last_line(text: str) -> str:
    """The last line that says something."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text.replace("\r", "\n"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:LAST_LINE] if lines else "it said nothing"
