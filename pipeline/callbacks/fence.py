"""One writer a stage: a job that another has replaced stops before it can write beside it.

When a node's daemon dies, Slurm starts the job elsewhere while the old ranks may still run there.
The launcher names each start of the ranks in ATTEMPT_ID and writes it to stageN/OWNER before they
start (`slurm.segment begin`); ranks without that variable were started by hand and take over.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.files import write_json

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

OWNER, VARIABLE = "OWNER", "ATTEMPT_ID"
EVERY_SECONDS = 1.0  # between two looks at the file, besides those before a save


class TakenOver(ValueError):
    """The stage belongs to another start of the ranks now."""


def owner(stage_dir: Path) -> str | None:
    """The attempt that may write in the stage directory; None where nobody has claimed it."""
    try:
        value = json.loads((stage_dir / OWNER).read_text(encoding="utf-8"))
        return str(value["attempt"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return ""  # damaged: nobody's, so not ours


class Fence(Callback):
    """Held by rank 0, which writes what is not sharded; its end ends the others."""

    def __init__(
        self,
        stage_dir: Path,
        attempt: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage_dir = stage_dir
        self.given = attempt if attempt is not None else os.environ.get(VARIABLE, "")
        self.attempt = self.given or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._clock = clock
        self._looked = 0.0

    def check(self) -> None:
        """Raises TakenOver unless this is still the stage's writer."""
        self._looked = self._clock()
        found = owner(self.stage_dir)
        if found != self.attempt:
            raise TakenOver(
                f"another job has taken over {self.stage_dir} ({found or 'unknown'}, this is "
                f"{self.attempt}); this one stops without writing"
            )

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.ranks.reports:
            return
        if not self.given or owner(self.stage_dir) is None:
            value = {"attempt": self.attempt, "host": socket.gethostname(), "pid": os.getpid()}
            write_json(self.stage_dir / OWNER, value)
        self.check()

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if trainer.ranks.reports and self._clock() - self._looked >= EVERY_SECONDS:
            self.check()

    def on_save(self, trainer: Trainer) -> None:
        if trainer.ranks.reports:
            self.check()

    def on_commit(self, trainer: Trainer) -> None:
        self.on_save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.ranks.reports:
            self.check()  # before DONE.json
