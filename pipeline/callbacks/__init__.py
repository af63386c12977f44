"""One behaviour a file; this is the standard set, in the order they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback
from pipeline.callbacks.checkpointing import Checkpointing
from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.progress import Progress
from pipeline.callbacks.reference_check import ReferenceCheck
from pipeline.callbacks.stop_signals import StopSignals
from pipeline.callbacks.tensorboard import TensorBoard
from pipeline.callbacks.triggers import TriggerFiles

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


def standard_callbacks(trainer: Trainer) -> list[Callback]:
    """What every training job does beside training."""
    directory, stage = trainer.stage_dir, trainer.config.stage
    checks: list[Callback] = [ReferenceCheck()] if stage.objective == "dpo" else []
    return [
        *checks,
        StopSignals(),
        TriggerFiles(directory),
        MetricsFile(directory / "metrics.jsonl"),
        TensorBoard(directory / "tensorboard"),
        Progress(stage.log_every),
        Checkpointing(stage.checkpoint.every),
    ]
