"""A checkpoint every N steps, at the last step, and when a stop was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class Checkpointing(Callback):
    """Runs last, so that a save holds what the other callbacks saw."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        last = event.step == trainer.total_steps
        if last or event.step % self.every == 0 or trainer.save_agreed or trainer.stop_agreed:
            trainer.save()
