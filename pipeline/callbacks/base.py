"""What a callback may do: watch steps, and ask the trainer to save or to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.step import StepResult

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


@dataclass(frozen=True)
class Work:
    """What one replica's share of a global batch asks of the model; padding excluded."""

    tokens: int
    attended: int  # pairs of tokens that causal attention looks at
    targets: int  # tokens with a loss
    tiles: int


@dataclass(frozen=True)
class BatchCounts:
    """What one global batch held, summed over data-parallel replicas."""

    tokens: int  # padding excluded
    samples: int
    images: int
    tiles: int
    masked: int  # samples replaced because their bytes were bad
    positions: int = 0  # tokens with padding
    replicas: tuple[Work, ...] = ()  # the share of each


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, seen from outside."""

    step: int  # steps done, this one included
    result: StepResult
    counts: BatchCounts
    rates: list[float]  # learning rates that the step used, highest first
    seconds: float  # from the end of the step before, waiting for data included
    data_seconds: float  # of them, waiting for data
    # `seconds` of this rank by kind (pipeline.timers.KINDS); empty where nobody measured.
    split: Mapping[str, float] = field(default_factory=dict)
    waits: tuple[float, ...] = ()  # data_seconds of every rank
    memory: tuple[float, ...] = ()  # peak bytes of every rank so far (pipeline.memory)


class Callback:
    """One behaviour. Every rank runs every callback, in the same order."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.state.step` is where it resumes."""

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """After each optimizer step."""

    def on_save(self, trainer: Trainer) -> None:
        """Before a checkpoint is written."""

    def on_saved(self, trainer: Trainer, seconds: float) -> None:
        """After a checkpoint was written, or begun in the background; training stood `seconds`."""

    def on_commit(self, trainer: Trainer) -> None:
        """Before what was written in the background becomes a checkpoint."""

    def on_committed(self, trainer: Trainer, seconds: float) -> None:
        """After it has; `seconds` since its save began. Only with `parallel.async_checkpoint`."""

    def on_exit(self) -> None:
        """When the steps are over, also by a failure; before `on_end`."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process, whether the stage is done or was stopped."""
