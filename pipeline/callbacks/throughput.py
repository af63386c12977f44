"""How fast a step was and where its time went: what the files, TensorBoard and the lines show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.schema import Config
from models.flops import ModuleFlops, batch_flops, training_flops
from pipeline.callbacks.base import StepEvent, Work
from pipeline.stages import trainable_modules

GIB = 2**30


@dataclass(frozen=True)
class Figures:
    """Of one step; see docs/throughput.md."""

    tokens_per_second: float  # of the whole job, padding excluded
    images_per_second: float
    tflops_per_gpu: float  # model FLOPs (models/flops.py), mean over ranks
    mfu: float | None  # of the GPU's dense BF16 peak, also where training is in FP8
    effective_tokens: float  # share of the computed tokens that are no padding
    imbalance: dict[str, float]  # the heaviest replica beside the mean one; 1 is even
    seconds: dict[str, float] = field(default_factory=dict)  # of rank 0 by kind
    seconds_data_max: float = 0.0  # of the rank that waited for its data longest
    data_rank: int = 0  # which one
    peak_memory_gib: float = 0.0  # of the rank with most

    def record(self) -> dict[str, Any]:
        """Plain values for metrics.jsonl, four digits, `seconds` as seconds_KIND."""
        values = asdict(self)
        seconds = values.pop("seconds")
        values["imbalance"] = {name: _short(value) for name, value in self.imbalance.items()}
        record = {
            name: _short(value) if isinstance(value, float) else value
            for name, value in values.items()
        }
        return record | {f"seconds_{kind}": round(value, 6) for kind, value in seconds.items()}


class Throughput:
    """Figures of steps, for one stage of one run."""

    def __init__(self, config: Config) -> None:
        self._model = config.model
        self._trained = trainable_modules(config.stage.lr)
        self._ranks = config.parallel.world_size
        self._peak = config.cluster.gpu_tflops
        self._last: tuple[StepEvent, Figures] | None = None

    def figures(self, event: StepEvent) -> Figures:
        """Of this step; several callbacks may ask, one computes."""
        if self._last is None or self._last[0] is not event:
            self._last = (event, self._compute(event))
        return self._last[1]

    def _compute(self, event: StepEvent) -> Figures:
        counts, seconds = event.counts, max(event.seconds, 1e-9)
        costs = [self.training_flops(share) for share in counts.replicas]
        tflops = sum(cost.total for cost in costs) / seconds / self._ranks / 1e12
        return Figures(
            tokens_per_second=counts.tokens / seconds,
            images_per_second=counts.images / seconds,
            tflops_per_gpu=tflops,
            mfu=None if self._peak is None else tflops / self._peak,
            effective_tokens=counts.tokens / max(counts.positions, 1),
            imbalance={
                "attention": heaviest([share.attended for share in counts.replicas]),
                "tiles": heaviest([share.tiles for share in counts.replicas]),
                "flops": heaviest([cost.total for cost in costs]),
            },
            seconds=dict(event.split),
            seconds_data_max=max(event.waits, default=event.data_seconds),
            data_rank=event.waits.index(max(event.waits)) if event.waits else 0,
            peak_memory_gib=max(event.memory, default=0.0) / GIB,
        )

    def training_flops(self, work: Work) -> ModuleFlops:
        """Forward and backward pass over one replica's share."""
        forward = batch_flops(self._model, work.tokens, work.attended, work.targets, work.tiles)
        return training_flops(forward, self._trained)


def heaviest(loads: Sequence[float]) -> float:
    """The largest load over the mean one; 1 where there is none at all."""
    mean = sum(loads) / max(len(loads), 1)
    return max(loads) / mean if mean else 1.0


def speed(figures: Figures) -> str:
    """For a progress line: `12,345 tok/s  412 TFLOP/s (MFU 41.7 %)`."""
    words = f"{figures.tokens_per_second:,.0f} tok/s  {_readable(figures.tflops_per_gpu)}"
    return words if figures.mfu is None else f"{words} (MFU {100 * figures.mfu:.1f} %)"


def _readable(tflops: float) -> str:
    return f"{tflops:.0f} TFLOP/s" if tflops >= 10 else f"{1000 * tflops:.3g} GFLOP/s"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
