"""metrics.jsonl: one line a step, the record that reports and comparisons read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipeline.callbacks.base import Callback, StepEvent
from pipeline.callbacks.throughput import Throughput
from pipeline.files import write_atomically

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


def keep_steps_up_to(path: Path, step: int) -> None:
    """Drop lines after `step` (they will be trained again) and a line cut by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(line + "\n" for line in kept).encode())


class MetricsFile(Callback):
    """Appends to `metrics.jsonl`; flushed at every step, so that a kill loses at most a line."""

    def __init__(self, path: Path, throughput: Throughput) -> None:
        self.path, self._throughput = path, throughput
        self._file: TextIO | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.ranks.reports:
            keep_steps_up_to(self.path, trainer.state.step)
            self._file = open(self.path, "a", encoding="utf-8")

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        if self._file is None:
            return
        record = {
            "step": event.step,
            "of": trainer.total_steps,
            **event.result.values,
            "terms": event.result.terms,
            "grad_norm": event.result.grad_norm,
            "lr": event.rates[0],
            "lrs": event.rates,
            "tokens": event.counts.tokens,
            "samples": event.counts.samples,
            "images": event.counts.images,
            "tiles": event.counts.tiles,
            "masked": event.counts.masked,
            "seconds": round(event.seconds, 6),
            **self._throughput.figures(event).record(),
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def on_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
