"""What a callback sees of a trainer, without torch's part of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.callbacks.base import BatchCounts, StepEvent


class FakeTrainer:
    """Records wishes and lines; rank 0 unless told otherwise."""

    def __init__(self, reports: bool = True, total_steps: int = 100) -> None:
        self.ranks = SimpleNamespace(reports=reports)
        self.state = SimpleNamespace(step=0)
        self.total_steps = total_steps
        self.said: list[str] = []
        self.stop_reason = ""
        self.saves = 0
        self.writing_seconds: float | None = None

    def say(self, message: str) -> None:
        self.said.append(message)

    def request_stop(self, reason: str) -> None:
        self.stop_reason = reason

    def request_save(self) -> None:
        self.saves += 1


def event(step: int = 1, seconds: float = 1.0) -> StepEvent:
    """A step that took `seconds`."""
    result: Any = SimpleNamespace(values={"loss": 1.0}, terms=1, grad_norm=1.0)
    return StepEvent(step, result, BatchCounts(1, 1, 0, 0, 0), [1e-3], seconds, 0.0)
