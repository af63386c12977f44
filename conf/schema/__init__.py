"""Typed configuration: one dataclass file per Hydra group, standard library only.

Nothing here imports torch, megatron, hydra or omegaconf, so that login nodes,
loaders and jobs can all share the same types.
"""

from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ConnectorConfig, ModelConfig, TextConfig, VisionConfig
from conf.schema.parallel import ParallelConfig
from conf.schema.precision import PrecisionConfig
from conf.schema.root import Config
from conf.schema.stage import (
    CheckpointConfig,
    LearningRates,
    OptimizerConfig,
    PreferenceConfig,
    StageConfig,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConnectorConfig",
    "DataConfig",
    "LearningRates",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PreferenceConfig",
    "SourceConfig",
    "StageConfig",
    "TextConfig",
    "VisionConfig",
]
