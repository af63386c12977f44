"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 end the step, save, and stop: nothing is lost.

A second SIGINT stops at once, as people expect of Ctrl-C.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from pipeline import early_signals
from pipeline.callbacks.base import Callback

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class StopSignals(Callback):
    """Turns signals into a request that all ranks agree on at the end of the step."""

    def on_start(self, trainer: Trainer) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and trainer.stop_reason:
                raise KeyboardInterrupt
            trainer.request_stop(signal.Signals(number).name)

        for number in early_signals.SIGNALS:
            signal.signal(number, handle)
        early_signals.disarm()
