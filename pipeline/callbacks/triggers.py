"""Files by which anyone who may write to the run directory steers a job they do not own.

`touch runs/NAME/stageN/SAVE` saves after the current step; `touch .../EXIT` saves and stops this
job, and the next one goes on. `touch runs/NAME/STOP` or `.../stageN/STOP` saves and stops for good:
the file stays, and nothing starts until somebody removes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

STOP = "STOP"


class TriggerFiles(Callback):
    """Looked for by one rank; the trainer tells the others. SAVE and EXIT are removed when seen."""

    def __init__(self, directory: Path) -> None:
        self.save, self.exit = directory / "SAVE", directory / "EXIT"
        self.stops = (directory / STOP, directory.parent / STOP)

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
        for stop in self.stops:
            if stop.exists():
                trainer.request_stop(f"{stop}")
