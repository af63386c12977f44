"""How the ranks are laid out: tensor, pipeline, context and data parallelism."""

from dataclasses import dataclass, field
from typing import Optional

from conf.schema.errors import ConfigError

RECOMPUTE = ("none", "selective", "full")
OPTIMIZER_STATES = ("fp32", "bf16")


@dataclass
class ParallelConfig:
    """One line of `conf/parallel`; data parallelism is what is left of `world_size`."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    # Chunks of layers on each pipeline stage (interleaved schedule); chunk i is on stage
    # i % pipeline.
    virtual_pipeline: int = 1
    # Decoder layers of each chunk, pipeline * virtual_pipeline numbers; null splits evenly.
    pipeline_layers: Optional[list[int]] = None
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    # Activations computed again in the backward pass: none; the `recompute_modules` of each layer
    # (selective); whole layers (full), all of a stage's or its first `recompute_layers`.
    recompute: str = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["mlp"])
    recompute_layers: Optional[int] = None
    # Adam's two moments and the master weights' remainders; bf16 needs Transformer Engine.
    optimizer_states: str = "fp32"
    optimizer_offload: float = 0.0  # share of the optimizer's state and work left to the CPU
    loss_chunk: int = 0  # tokens whose logits exist at one time; 0: the whole row's
    async_checkpoint: bool = False  # write while training goes on

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // self.model_ranks

    def check(self) -> None:
        for name in ("world_size", "tensor", "pipeline", "context", "virtual_pipeline"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: at least 1 is needed")
        if self.world_size % self.model_ranks:
            raise ConfigError(
                f"parallel.world_size={self.world_size} is not a multiple of "
                f"tensor*pipeline*context={self.tensor}*{self.pipeline}*{self.context}"
                f"={self.model_ranks}; change one of them"
            )
        if self.recompute not in RECOMPUTE:
            raise ConfigError(
                f"parallel.recompute={self.recompute!r} is none of {', '.join(RECOMPUTE)}"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true needs parallel.tensor > 1; switch it off"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1; "
                "set it to 1"
            )
        chunks = self.pipeline * self.virtual_pipeline
        if self.pipeline_layers is not None and len(self.pipeline_layers) != chunks:
            raise ConfigError(
                f"parallel.pipeline_layers={self.pipeline_layers} names "
                f"{len(self.pipeline_layers)} chunks, but parallel.pipeline="
                f"{self.pipeline} * parallel.virtual_pipeline={self.virtual_pipeline} are {chunks}"
            )
        if self.optimizer_states not in OPTIMIZER_STATES:
            raise ConfigError(
                f"parallel.optimizer_states={self.optimizer_states!r} is none of "
                f"{', '.join(OPTIMIZER_STATES)}"
            )
        if not 0 <= self.optimizer_offload <= 1:
            raise ConfigError(
                f"parallel.optimizer_offload={self.optimizer_offload} is not in [0, 1]"
            )
        if self.loss_chunk < 0:
            raise ConfigError(f"parallel.loss_chunk={self.loss_chunk} must not be negative")
        if self.overlap_param_gather and not self.distributed_optimizer:
            raise ConfigError(
                "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true"
            )
