"""The whole configuration of one stage of one run."""

from dataclasses import dataclass
from typing import Optional

from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.parallel import ParallelConfig
from conf.schema.precision import PrecisionConfig
from conf.schema.stage import StageConfig


@dataclass
class Config:
    """Composed by Hydra from one choice per group plus command-line overrides."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    stage: StageConfig
    data: DataConfig
    cluster: ClusterConfig
    run: str = "run"  # name of the run
    runs_dir: str = "runs"
    # Stage directory that the stage starts from; null: the stage before in the same run,
    # and for stage 1 the run's `import/`.
    init_from: Optional[str] = None
