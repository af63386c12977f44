"""One element of an array: its items, one after the other.

    python -m slurm.array_element WAVE_DIRECTORY [INDEX]

INDEX is Slurm's SLURM_ARRAY_TASK_ID if it is not given. An item that is done already is passed
over, so a requeued element goes on where it was; one that fails is recorded and the next one
starts. It stops between two items at SIGTERM or SIGUSR2, at a file STOP in the run's or the task's
folder, and where the longest item so far would not fit into the walltime any more. Exit code: 0 all
done, 1 some failed, 143 stopped before.
"""

import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from conf.schema.errors import ConfigError
from slurm.array_items import Item, TaskFolder, Wave, read_wave
from slurm.array_process import Ending, Processes

STOPPED = 128 + signal.SIGTERM
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
STOP_SECONDS = 1.0  # between an item's end by a signal and the one to this process
SPARE_SECONDS = 30.0  # of the walltime, for writing and ending


@dataclass
class Stop:
    """Whether the element shall begin no further item."""

    ends: float = float("inf")  # time.monotonic() by which it must be over
    longest: float = 0.0  # seconds of an item
    reason: str = ""
    _asked: threading.Event = field(default_factory=threading.Event)

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._asked.set()

    def wanted(self) -> bool:
        if not self.reason and time.monotonic() + self.longest + SPARE_SECONDS > self.ends:
            self.reason = "the walltime is too short for another item"
        return bool(self.reason)

    def comes(self, seconds: float) -> bool:
        """Whether a signal asks within `seconds`."""
        return self._asked.wait(seconds)

    def listen(self, again: Callable[[], None]) -> dict[int, Any]:
        """From now on a stop signal asks, a second one calls `again`; returns the old handlers."""

        def received(number: int, _: FrameType | None) -> None:
            if self.reason:
                again()
            self.ask(f"stopped by {signal.Signals(number).name}")

        return {number: signal.signal(number, received) for number in STOP_SIGNALS}


Start = Callable[[Item], Ending]


def run_element(folder: TaskFolder, wave: Wave, index: int, stop: Stop, start: Start) -> int:
    """Run the items of element `index` that are not done; returns the exit code.

    `start` runs one item to its end.
    Raises ConfigError on an index that the wave does not have, OSError where nothing can be
    recorded.
    """
    if not 0 <= index < len(wave.elements):
        raise ConfigError(f"wave {wave.number} of {folder.root} has no element {index}")
    items = wave.elements[index]
    failed = 0
    for position, item in enumerate(items):
        title = f"[{position + 1}/{len(items)} {item.name}]"
        if folder.is_done(item):
            print(f"{title} done already", flush=True)
            continue
        stop_file = folder.stop_file()
        if stop_file is not None:
            stop.ask(f"{stop_file} is there")
        if stop.wanted():
            print(f"{stop.reason}; {len(items) - position} items are left", flush=True)
            return STOPPED
        print(f"{title} {shlex.join(item.words)}", flush=True)
        folder.begin(item, wave)
        began, clock = time.time(), time.monotonic()
        ending = start(item)
        seconds = time.monotonic() - clock
        # Cancelled or preempted: Slurm ends the item together with this process.
        killed = ending.code - 128 in STOP_SIGNALS
        if killed and stop.comes(STOP_SECONDS):
            print(f"{title} {stop.reason}, {len(items) - position} items are left", flush=True)
            return STOPPED
        stop.longest = max(stop.longest, seconds)
        facts = {
            "seconds": round(seconds, 3),
            "began": round(began, 3),
            "ended": round(time.time(), 3),
            "said": ending.said,
            "element": index,
            "job": os.environ.get("SLURM_ARRAY_JOB_ID", ""),
            "node": socket.gethostname(),
        }
        if folder.end(item, wave, ending.code, facts):
            print(f"{title} done in {seconds:.1f} s", flush=True)
        else:
            failed += 1
            print(f"{title} FAILED with exit code {ending.code}: {ending.said}", flush=True)
    return 1 if failed else 0


def seconds_left(hours: float) -> float:
    """Until the walltime ends: by Slurm's word, else `hours` from now."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - time.time() if end.isdigit() else hours * 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) == 1:
        given.append(os.environ.get("SLURM_ARRAY_TASK_ID", ""))
    if len(given) != 2 or not given[1].isdigit():
        print(f"usage: {(__doc__ or '').splitlines()[2].strip()}", file=sys.stderr)
        return 2
    directory = Path(given[0])
    stop, processes = Stop(), Processes()
    stop.listen(again=processes.terminate)
    try:
        wave = read_wave(directory)
        stop.ends = time.monotonic() + seconds_left(wave.hours)
        return run_element(TaskFolder(directory.parent), wave, int(given[1]), stop, processes.run)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
