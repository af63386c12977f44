"""How the ranks are laid out: tensor, pipeline, context and data parallelism."""

from dataclasses import dataclass
from typing import Optional

from conf.schema.errors import ConfigError

RECOMPUTE = ("none", "selective", "full")


@dataclass
class ParallelConfig:
    """One line of `conf/parallel`; data parallelism is what is left of `world_size`."""

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    # Decoder layers on each pipeline stage; null splits evenly.
    pipeline_layers: Optional[list[int]] = None
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute: str = "none"

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // self.model_ranks

    def check(self) -> None:
        for name in ("world_size", "tensor", "pipeline", "context"):
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
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            raise ConfigError(
                f"parallel.pipeline_layers={self.pipeline_layers} names "
                f"{len(self.pipeline_layers)} stages, but parallel.pipeline={self.pipeline}"
            )
        if self.overlap_param_gather and not self.distributed_optimizer:
            raise ConfigError(
                "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true"
            )
