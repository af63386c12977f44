"""One behaviour a file; this is the standard set, in the order they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback
from pipeline.callbacks.checkpointing import Checkpointing
from pipeline.callbacks.fence import Fence
from pipeline.callbacks.metrics import MetricsFile
from pipeline.callbacks.progress import Progress
from pipeline.callbacks.reference_check import ReferenceCheck
from pipeline.callbacks.stop_signals import StopSignals
from pipeline.callbacks.tensorboard import TensorBoard
from pipeline.callbacks.throughput import Throughput
from pipeline.callbacks.triggers import TriggerFiles
from pipeline.callbacks.walltime import Walltime, stop_after
from pipeline.callbacks.watchdog import Watchdog

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


def standard_callbacks(trainer: Trainer, started: float) -> list[Callback]:
    """What every training job does beside training.

    `started` is when the process did, on the monotonic clock.
    """
    directory, stage = trainer.stage_dir, trainer.config.stage
    throughput = Throughput(trainer.config)
    checks: list[Callback] = [ReferenceCheck()] if stage.objective == "dpo" else []
    return [
        *checks,
        Fence(directory),
        StopSignals(),
        TriggerFiles(directory),
        Walltime(stop_after(), started),
        Watchdog(directory, 60 * trainer.config.cluster.hang_minutes),
        MetricsFile(directory / "metrics.jsonl", throughput),
        TensorBoard(directory / "tensorboard", throughput),
        Progress(stage.log_every, throughput),
        Checkpointing(stage.checkpoint.every),
    ]
