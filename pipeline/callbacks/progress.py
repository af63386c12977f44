"""Progress lines with an estimate of the time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.callbacks.throughput import Throughput, speed

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

_SMOOTHING = 0.9


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress(Callback):
    """A line at the first and last step, every `log_every` steps, at most every `seconds`."""

    def __init__(self, every: int, throughput: Throughput, seconds: float = 5.0) -> None:
        self.every, self.seconds, self._throughput = every, seconds, throughput
        self._last_line = 0.0
        self._step_seconds: float | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.ranks.reports and trainer.state.step:
            trainer.say(f"resumes after step {trainer.state.step} of {trainer.total_steps}")

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if not trainer.ranks.reports:
            return
        smooth = self._step_seconds
        self._step_seconds = (
            event.seconds
            if smooth is None
            else _SMOOTHING * smooth + (1 - _SMOOTHING) * event.seconds
        )
        last = event.step == trainer.total_steps
        due = event.step % self.every == 0 and time.monotonic() - self._last_line >= self.seconds
        if not (due or last or smooth is None):
            return
        self._last_line = time.monotonic()
        values = "  ".join(f"{name} {value:.4f}" for name, value in event.result.values.items())
        left = (trainer.total_steps - event.step) * self._step_seconds
        masked = f"  masked {event.counts.masked}" if event.counts.masked else ""
        trainer.say(
            f"step {event.step}/{trainer.total_steps}  {values}  |g| {event.result.grad_norm:.3f}  "
            f"lr {event.rates[0]:.2e}  {speed(self._throughput.figures(event))}{masked}  "
            f"ETA {duration(left)}"
        )
