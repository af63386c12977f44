"""How long a stage will take: what its recipe says, or what its own steps have shown."""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config

LAST_STEPS = 200  # whose times count


@dataclass(frozen=True)
class Estimate:
    """Hours of walltime that a stage still needs; None where nothing is known."""

    hours: float | None
    segments: int  # jobs that take so long, without spares
    measured: bool = False

    @property
    def source(self) -> str:
        return "measured" if self.measured else "planned" if self.hours is not None else "unknown"


def estimate(config: Config, stage_dir: Path) -> Estimate:
    """From steps left and the median of the last steps' times, else from `stage.gpu_hours`."""
    stage, cluster = config.stage, config.cluster
    step, spent, median = progress(stage_dir / "metrics.jsonl")
    hours: float | None = None
    ranks = config.parallel.world_size
    measured = bool(step and stage.steps is not None)
    if step and stage.steps is not None:
        hours = max(0, stage.steps - step) * median / 3600
    elif stage.gpu_hours is not None:
        hours = max(0.0, cluster.stage_hours(stage.gpu_hours, ranks) - spent / 3600)
    usable = cluster.hours - cluster.stop_minutes / 60
    segments = max(1, math.ceil(hours / usable - 1e-9)) if hours is not None else 1
    return Estimate(hours, segments, measured)


def progress(metrics: Path) -> tuple[int, float, float]:
    """Newest step, seconds of all steps, median of the last ones; zeros where there is no file."""
    step, spent = 0, 0.0
    last: deque[float] = deque(maxlen=LAST_STEPS)
    try:
        lines = metrics.open(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0, 0.0, 0.0
    with lines:
        for line in lines:
            try:
                record = json.loads(line)
                number, seconds = int(record["step"]), float(record["seconds"])
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill
            if seconds >= 0 and math.isfinite(seconds):
                step, spent = max(step, number), spent + seconds
                last.append(seconds)
    return step, spent, statistics.median(last) if last else 0.0
