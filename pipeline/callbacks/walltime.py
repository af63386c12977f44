"""Saves and stops before the job's time is over, also when its signals get lost.

The launcher says in STOP_AFTER_SECONDS by when, in seconds from the start of the process.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from conf.schema.errors import ConfigError
from pipeline.callbacks.base import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

VARIABLE = "STOP_AFTER_SECONDS"
_SAFETY = 1.5  # a step or a save may take so much longer than the slowest seen lately
_RECENT_STEPS = 20


def stop_after() -> float | None:
    """Seconds of this process's life after which it must have stopped; None: no limit.

    Raises:
        ConfigError: the variable is no number.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{VARIABLE}={text!r} is not a number of seconds; unset it") from None


class Walltime(Callback):
    """Watches the clock on one rank; the trainer tells the others.

    Ranks agree on a stop in the step after the wish, so a wish costs a step and a save, and not
    wishing now costs a step more before the next chance. A save in the background that is not
    done by then is waited for first.
    """

    def __init__(
        self,
        seconds: float | None,
        started: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`started` is the start of the process on `clock`, which no change of the time moves."""
        self.end = None if seconds is None else started + seconds
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._save = 0.0  # seconds of the slowest save
        self._saved_since = 0.0  # seconds of saving that the next step's event counts in
        self._asked = False

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        self._steps.append(max(0.0, event.seconds - self._saved_since))
        self._saved_since = 0.0
        if self.end is None or self._asked or not trainer.ranks.reports:
            return
        left = self.end - self._clock()
        if left < _SAFETY * (2 * max(self._steps) + self._saves(trainer.writing_seconds)):
            self._asked = True
            trainer.say(
                f"the job's time is nearly over ({max(left, 0.0):.0f} s before its reserve): "
                "saves and stops"
            )
            trainer.request_stop("walltime")

    def _saves(self, writing: float | None) -> float:
        """Seconds of the last save, and of what is left of one that began `writing` seconds ago."""
        if writing is None:
            return self._save
        longest = max(self._save, writing)  # not the first: how long it takes is not known yet
        return longest + longest - writing

    def on_saved(self, trainer: Trainer, seconds: float) -> None:
        self._save = max(self._save, seconds)
        self._saved_since += seconds

    def on_committed(self, trainer: Trainer, seconds: float) -> None:
        self._save = max(self._save, seconds)
