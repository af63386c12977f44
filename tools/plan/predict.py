"""One stage's prediction: memory, speed and cost together."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config
from tools.plan.cost import STORAGE, Cost, cost_of
from tools.plan.job import Job, job_of
from tools.plan.memory import Fit, fit
from tools.plan.step import Step, step
from tools.plan.workload import Row, row_of, steps_of


@dataclass(frozen=True)
class Prediction:
    """What a stage needs, how fast it is and what it costs."""

    config: Config
    row: Row  # one pack
    job: Job
    fit: Fit
    step: Step
    cost: Cost

    @property
    def mfu(self) -> float:
        """The model's FLOP/s beside the data sheet's BF16 rate."""
        return self.step.tflops_per_gpu / self.job.gpu.tflops


def predict(
    config: Config,
    settings: Mapping[str, float] | None = None,
    row: Row | None = None,
    job: Job | None = None,
) -> Prediction:
    """Predict a checked configuration.

    Args:
        settings: tools/plan/workload.py's SETTINGS, and `storage`, from the command line.
        row: one pack, and
        job: its stage, where they are known already.

    Raises:
        ConfigError: facts about the GPU are missing, or a setting is out of range.
    """
    settings = dict(settings or {})
    row = row or row_of(config, settings)
    job = job or job_of(config, row)
    seconds = step(job)
    cost = cost_of(
        config,
        job,
        seconds,
        steps_of(config, row, settings),
        Path(config.runs_dir) / config.run / config.stage.name,
        settings.get("storage", STORAGE),
    )
    return Prediction(config, row, job, fit(job), seconds, cost)
