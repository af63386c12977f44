"""Ends a job that hangs, and tells where every rank stood.

One rank that waits for ever makes all others wait for it, and the process groups' own limit (half
an hour) then names a collective, not a cause. Here each rank watches its own steps: when one takes
far longer than any before, its stacks go to `stageN/hangs/`, one line to the job's output, and the
process ends, so that the launcher starts the ranks again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.timers import CHECKPOINT

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

HUNG = 124  # the exit code, as timeout(1)'s
_TIMES = 5.0  # so many times the slowest step is no hang
_SAVING = 3.0  # a file system may be slower than any step
_GRACE = 5.0  # seconds in which the other ranks write their stacks too


class Watchdog(Callback):
    """A thread that looks at the clock, on every rank.

    It needs the interpreter to run: code that hangs without releasing its lock stops this rank's
    watchdog, and the other ranks' end the job.
    """

    def __init__(
        self,
        stage_dir: Path,
        seconds: float,
        end: Callable[[int], object] = os._exit,
        grace: float = _GRACE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds` without a step, a save or their end are a hang; 0 watches nothing."""
        self.directory = stage_dir / "hangs"
        self.seconds = seconds
        self._end, self._grace, self._clock = end, grace, clock
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._beat = 0.0
        self._slowest = 0.0
        self._trainer: Trainer | None = None

    @property
    def limit(self) -> float:
        """Seconds after the last sign of progress that make a hang of what goes on now."""
        limit = max(self.seconds, _TIMES * self._slowest)
        return limit * _SAVING if self._phase() == CHECKPOINT else limit

    def on_start(self, trainer: Trainer) -> None:
        self._trainer, self._beat = trainer, self._clock()
        if self.seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        self._slowest = max(self._slowest, event.seconds)
        self._beat = self._clock()

    def on_saved(self, trainer: Trainer, seconds: float) -> None:
        self._beat = self._clock()

    def on_committed(self, trainer: Trainer, seconds: float) -> None:
        self._beat = self._clock()

    def on_exit(self) -> None:
        self._stopped.set()

    def _phase(self) -> str:
        """What the trainer's timers say it does now, "" between them."""
        return "" if self._trainer is None else self._trainer.timers.running

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            quiet = self._clock() - self._beat
            if quiet > self.limit:
                self._report(quiet)
                self._end(HUNG)
                return

    def _report(self, quiet: float) -> None:
        assert self._trainer is not None
        ranks, step = self._trainer.ranks, self._trainer.state.step + 1
        path = self.directory / f"step_{step:08d}_rank_{ranks.rank:05d}.txt"
        line = (
            f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()} made no progress "
            f"for {quiet:.0f} s in step {step}, {self._phase() or 'between timers'}, at "
            f"{self._place()}"
        )
        print(f"error: hang: {line}; stacks in {path}", file=sys.stderr, flush=True)
        # The file system may be what hangs.
        writer = threading.Thread(target=self._write, args=(path, line), daemon=True)
        writer.start()
        writer.join(self._grace)
        self._stopped.wait(self._grace)

    def _place(self) -> str:
        """File, line and function of the main thread."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "an unknown place"
        name = "/".join(Path(frame.f_code.co_filename).parts[-3:])
        return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"

    def _write(self, path: Path, line: str) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                print(line, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"warning: {path} could not be written ({error})", file=sys.stderr, flush=True)
