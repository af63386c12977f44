"""What one training stage does: objective, what is trained, how fast, on how much."""

from dataclasses import dataclass, field
from typing import Optional

from conf.schema.errors import ConfigError

OBJECTIVES = ("sft", "dpo")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class LearningRates:
    """Peak learning rate of each module; 0 freezes it (no gradient, no optimizer state)."""

    vision: float = 0.0
    connector: float = 0.0
    language: float = 0.0

    def check(self) -> None:
        rates = (self.vision, self.connector, self.language)
        if min(rates) < 0:
            raise ConfigError(f"stage.lr={self} has a negative rate")
        if max(rates) == 0:
            raise ConfigError("stage.lr trains nothing: every rate is 0; set at least one")


@dataclass
class OptimizerConfig:
    """AdamW with warmup and decay; warmup is a share of all steps."""

    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0

    def check(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"stage.optimizer.schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"stage.optimizer.warmup_ratio={self.warmup_ratio} is not in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"stage.optimizer.min_lr_ratio={self.min_lr_ratio} is not in [0, 1]")


@dataclass
class PreferenceConfig:
    """DPO (Rafailov et al. 2023), sigmoid loss."""

    beta: float = 0.1

    def check(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"stage.preference.beta={self.beta}: it must be positive")


@dataclass
class CheckpointConfig:
    """When to save and how many to keep; the last step is always saved and kept."""

    every: int = 500  # steps
    keep: int = 2

    def check(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ConfigError("stage.checkpoint.every and stage.checkpoint.keep must be at least 1")


@dataclass
class StageConfig:
    """One stage. A batch is counted in packs: rows of `sequence_length` tokens."""

    name: str
    number: int  # 1, 2, 3: stage N starts from stage N-1, stage 1 from the import
    objective: str
    lr: LearningRates
    sequence_length: int
    global_batch_size: int  # packs per optimizer step, over all replicas
    micro_batch_size: int = 1  # packs per forward pass of one replica
    # Exactly one of the two.
    steps: Optional[int] = None
    epochs: Optional[float] = None
    packing: bool = True  # false: one sample per row
    # Every document is padded to a multiple of this, so that the plan does not depend on
    # the context-parallel size; context parallelism needs a multiple of 2*parallel.context.
    document_multiple: int = 1
    max_tiles_per_pack: Optional[int] = None
    # The same as a multiple of the tiles that a full pack of this mixture holds on average; 1.08
    # keeps replicas level at little cost in padding. Not beside max_tiles_per_pack.
    max_tiles_over_mean: Optional[float] = None
    seed: int = 1234
    log_every: int = 1
    # Expected GPU-hours (without GPUs, rank-hours) of the whole stage: how many jobs are queued.
    gpu_hours: Optional[float] = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def check(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"stage.objective={self.objective!r} is none of {', '.join(OBJECTIVES)}"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"set exactly one of stage.steps (now {self.steps}) and stage.epochs "
                f"(now {self.epochs}); null unsets"
            )
        for name in (
            "sequence_length",
            "global_batch_size",
            "micro_batch_size",
            "document_multiple",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage.{name}={getattr(self, name)}: at least 1 is needed")
        if self.sequence_length % self.document_multiple:
            raise ConfigError(
                f"stage.sequence_length={self.sequence_length} is not a multiple of "
                f"stage.document_multiple={self.document_multiple}"
            )
        if self.max_tiles_over_mean is not None and (
            self.max_tiles_per_pack is not None or self.max_tiles_over_mean < 1
        ):
            raise ConfigError(
                f"stage.max_tiles_over_mean={self.max_tiles_over_mean}: at least 1, and not beside "
                "stage.max_tiles_per_pack; null unsets one of them"
            )
        self.lr.check()
        self.optimizer.check()
        self.preference.check()
        self.checkpoint.check()
