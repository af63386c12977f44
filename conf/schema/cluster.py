"""Where a job runs."""

from dataclasses import dataclass

from conf.schema.errors import ConfigError


@dataclass
class ClusterConfig:
    """`local` starts the ranks as processes on this machine."""

    name: str
    executor: str = "local"
    gpus_per_node: int = 0
    fp8: bool = False  # compute capability >= 8.9
    threads_per_rank: int = 1

    def check(self) -> None:
        if self.executor != "local":
            raise ConfigError(f"cluster.executor={self.executor!r}: only local is known")
