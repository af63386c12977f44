"""The same numbers for TensorBoard, under `tensorboard/` of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.callbacks.throughput import Figures, Throughput

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class TensorBoard(Callback):
    """Writes scalars; steps trained again after a resume overwrite their old points."""

    def __init__(self, directory: Path, throughput: Throughput) -> None:
        self.directory, self._throughput = directory, throughput
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.ranks.reports:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.directory), purge_step=trainer.state.step + 1, flush_secs=30
            )

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if self._writer is None:
            return
        for name, value in event.result.values.items():
            self._writer.add_scalar(f"train/{name}", value, event.step)
        self._writer.add_scalar("train/grad_norm", event.result.grad_norm, event.step)
        self._writer.add_scalar("train/lr", event.rates[0], event.step)
        for name, value in _scalars(self._throughput.figures(event)).items():
            self._writer.add_scalar(name, value, event.step)

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


def _scalars(figures: Figures) -> dict[str, float]:
    return {
        **{
            f"speed/{name}": getattr(figures, name)
            for name in ("tokens_per_second", "images_per_second", "tflops_per_gpu", "mfu")
            if getattr(figures, name) is not None
        },
        "speed/effective_tokens": figures.effective_tokens,
        **{f"imbalance/{name}": value for name, value in figures.imbalance.items()},
        **{f"seconds/{kind}": value for kind, value in figures.seconds.items()},
        "seconds/data_max": figures.seconds_data_max,
        "memory/peak_gib": figures.peak_memory_gib,
    }
