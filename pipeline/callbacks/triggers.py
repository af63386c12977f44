"""Files by which anyone who may write to the run directory steers a job they do not own.

`touch runs/NAME/stageN/SAVE` saves after the current step; `touch .../EXIT` saves and stops.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class TriggerFiles(Callback):
    """Looked for by one rank; the trainer tells the others. A file found is removed."""

    def __init__(self, directory: Path) -> None:
        self.save, self.exit = directory / "SAVE", directory / "EXIT"

    def on_start(self, trainer: Trainer) -> None:
        if trainer.ranks.reports:
            self.exit.unlink(missing_ok=True)  # it stopped the segment before this one

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if not trainer.ranks.reports:
            return
        if self.save.exists():
            self.save.unlink(missing_ok=True)
            trainer.request_save()
        if self.exit.exists():
            self.exit.unlink(missing_ok=True)
            trainer.request_stop("EXIT file")
