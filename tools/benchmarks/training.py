"""The real training step in one process: Megatron's wrapper, schedule and optimizer.

Needs torch, NumPy, megatron-core (and Transformer Engine where there is a GPU), nothing else: a
bare GPU machine can run it.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    LearningRates,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    StageConfig,
)
from conf.schema.stage import OptimizerConfig
from data_shards.batch import PackedBatch
from models.llava_next import LlavaNext
from pipeline.distributed import session
from pipeline.objectives.base import Objective
from pipeline.objectives.sft import SupervisedObjective

ALL = LearningRates(vision=2e-5, connector=1e-4, language=1e-4)


def training_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    sequence_length: int,
    packs: int = 1,
    lr: LearningRates = ALL,
    optimizer: OptimizerConfig | None = None,
    objective: str = "sft",
) -> Config:
    """A stage without data on disk: `packs` packs of `sequence_length` tokens, one micro-batch."""
    number = 3 if objective == "dpo" else 2
    stage = StageConfig(
        name=f"stage{number}",
        number=number,
        objective=objective,
        lr=lr,
        sequence_length=sequence_length,
        global_batch_size=packs,
        micro_batch_size=packs,
        steps=1000,
        optimizer=optimizer or OptimizerConfig(schedule="constant", warmup_ratio=0.0),
    )
    nothing = DataConfig(root="", tokenizer="")
    return Config(model, parallel, precision, stage, nothing, ClusterConfig(name="bench"))


@contextmanager
def alone(parallel: ParallelConfig | None = None, seed: int = 1234) -> Iterator[torch.device]:
    """A job of one process, on the GPU if there is one; yields the device.

    Once in the life of a process; OMP_NUM_THREADS decides the threads on a CPU.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with session(parallel or ParallelConfig(), seed) as ranks:
        yield ranks.device


@dataclass
class Job:
    """A model in training: what `pipeline.model` and `pipeline.optimizer` make."""

    config: Config
    device: torch.device
    models: Any
    optimizer: Any
    schedule: Any

    @property
    def network(self) -> LlavaNext:
        """The whole model, unwrapped."""
        network = self.models[0].module
        assert isinstance(network, LlavaNext)
        return network

    def step(
        self, batches: Sequence[PackedBatch], objective: Objective | None = None
    ) -> dict[str, float]:
        """One optimizer step; the objective's means, and `grad_norm`."""
        from pipeline.step import train_step

        result = train_step(
            self.models,
            self.optimizer,
            objective or SupervisedObjective(),
            batches,
            self.config.stage,
            self.device,
        )
        self.schedule.step(1)
        return {**result.values, "grad_norm": result.grad_norm}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Fill in weights (Megatron names, unsharded); the master copy follows."""
        own = dict(self.network.named_parameters())
        assert sorted(own) == sorted(state)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.optimizer.reload_model_params()


def build_job(config: Config, device: torch.device) -> Job:
    """Model, optimizer and schedule of `config`, inside `alone`."""
    from pipeline.model import build_training_model
    from pipeline.optimizer import build_optimizer, build_schedule

    models = build_training_model(config)
    for model in models:
        model.train()
    optimizer = build_optimizer(models, config.stage, config.parallel, config.precision)
    schedule = build_schedule(optimizer, config.stage, config.stage.steps or 1)
    return Job(config, device, models, optimizer, schedule)
