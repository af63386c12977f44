"""Some steps under torch's profiler: a trace for a viewer and a table for the eye, a rank each."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.files import write_atomically

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

ROWS = 40  # of the table


@dataclass(frozen=True)
class Steps:
    """Which steps: `wait` without the profiler, `warmup` with it but not kept, `active` kept."""

    wait: int = 1
    warmup: int = 1
    active: int = 2

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.wait + self.warmup + self.active

    def check(self) -> None:
        """ValueError for what the profiler would not take."""
        if min(self.wait, self.warmup) < 0 or self.active < 1:
            raise ValueError(f"{self}: wait and warmup are at least 0, active at least 1")


class Profile(Callback):
    """Writes `rank_N.trace.json.gz` (Chrome's trace format) and `rank_N.txt`.

    The trace also shows the timers of `pipeline.timers`, by their names.
    """

    def __init__(self, directory: Path, steps: Steps, ranks: Collection[int] | None = None) -> None:
        """`ranks` are those that record; None: all."""
        steps.check()
        self.directory, self.steps, self.ranks = directory, steps, ranks
        self._profiler: profile | None = None

    def on_start(self, trainer: Trainer) -> None:
        rank = trainer.ranks.rank
        if self.ranks is not None and rank not in self.ranks:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        steps = self.steps
        self.directory.mkdir(parents=True, exist_ok=True)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=steps.wait, warmup=steps.warmup, active=steps.active, repeat=1),
            on_trace_ready=lambda found: self._write(found, rank),
            record_shapes=True,
            profile_memory=True,
        )
        trainer.timers.annotates = True
        self._profiler.start()

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_end(self, trainer: Trainer) -> None:
        if self._profiler is not None:
            trainer.timers.annotates = False
            self._profiler.stop()
            self._profiler = None

    def _write(self, found: profile, rank: int) -> None:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        trace = self.directory / f"rank_{rank}.trace.json.gz"
        partial = self.directory / f".partial_rank_{rank}.trace.json.gz"  # torch goes by the ending
        found.export_chrome_trace(str(partial))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, trace)
        head = f"{self.steps.active} steps of rank {rank}, the {ROWS} rows with most {order}\n"
        write_atomically(self.directory / f"rank_{rank}.txt", (head + table + "\n").encode())
