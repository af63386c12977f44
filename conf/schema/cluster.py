"""Where a job runs: the machine's shape, the site's rules, and what this run asks of them."""

from dataclasses import dataclass, field
from typing import Optional

from conf.schema.errors import ConfigError

EXECUTORS = ("local", "slurm")
GPU_FLAGS = ("gres", "gpus-per-node", "none")
LOCAL_RANKS_WITHOUT_GPUS = 1


@dataclass
class QueueConfig:
    """Limits of one QoS or partition; null where the site states none."""

    hours: float  # longest walltime of a job
    nodes: Optional[int] = None  # most nodes of one job
    min_nodes: int = 1
    submitted: Optional[int] = None  # most jobs of a user, queued or running (elements count)
    running: Optional[int] = None  # most jobs of one user that run at once


@dataclass
class SiteConfig:
    """What a site demands of a batch script."""

    account_required: bool = False
    qos_required: bool = False
    # QoS or partition -> its limits. The limits that hold are those of `cluster.qos` if it is
    # listed, else those of `cluster.partition`.
    queues: dict[str, QueueConfig] = field(default_factory=dict)
    max_array_size: Optional[int] = None  # Slurm's MaxArraySize, elements of one array
    memory_flag: bool = True  # whether --mem may be given
    gpu_flag: str = "gpus-per-node"  # how GPUs are asked for
    login_shell: bool = False  # `module` exists in login shells only
    setup: list[str] = field(default_factory=list)  # shell lines before anything else (modules)
    environment: dict[str, str] = field(default_factory=dict)  # NCCL, UCX, ...
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, without their dashes
    srun: list[str] = field(default_factory=list)  # further words for every srun
    master_interface: Optional[str] = None  # network interface of rank 0's address; null: by name
    container: Optional[str] = None  # words before `python` that enter a container
    # GPUs that a job of one process asks for though it uses none, where a queue of GPU nodes wants
    # GPUs and cores in a fixed proportion.
    single_gpus: int = 0
    local_scratch: Optional[str] = None  # node-local directory, as a shell word
    cost_unit: str = "GPU-hours"
    cost_per_gpu_hour: float = 1.0
    min_bandwidth: float = 0.0  # GB/s of an all-reduce between nodes (bus bandwidth); 0: any


@dataclass
class ClusterConfig:
    """One choice of `conf/cluster`, and what the command line changes of it.

    `local` starts the ranks as processes on this machine; `slurm` queues batch jobs.
    """

    name: str
    executor: str = "local"
    detect: bool = False  # ask the Slurm at hand for the node's shape and the limits

    # One node.
    gpus_per_node: int = 0
    gpu: Optional[str] = None  # "H100 64 GB"
    gpu_memory_gb: Optional[float] = None
    fp8: bool = False  # compute capability >= 8.9
    cpus_per_node: Optional[int] = None  # physical cores that a job may have
    memory_gb: Optional[int] = None
    ranks_per_node: Optional[int] = None  # null: a rank a GPU; without GPUs one
    threads_per_rank: int = 1
    speed: float = 1.0  # of one GPU, beside the H100 for which stage.gpu_hours is given

    # Whose hours, and in which queue. From SLURM_ACCOUNT and SLURM_QOS or the command line.
    account: Optional[str] = None
    qos: Optional[str] = None
    partition: Optional[str] = None
    reservation: Optional[str] = None
    exclude: list[str] = field(default_factory=list)  # nodes to avoid

    # What a job asks for.
    hours: float = 24.0  # walltime of one segment
    stop_minutes: float = 10.0  # before its end: save and stop
    spare_segments: int = 1  # beyond those that the stage is expected to need
    restarts: int = 2  # times that a failed segment starts its ranks again in the same job
    exclusive: bool = True
    python: Optional[str] = None  # interpreter of the jobs; null: the one that submits
    preflight: bool = True
    confirm_gpu_hours: float = 100.0  # a plan above this is confirmed by hand, or with yes=true

    # What is meant where `parallel=` or `precision=` is not given; conf/compose.py looks these up.
    layouts: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> stage -> parallel
    precisions: dict[str, str] = field(default_factory=dict)  # model -> precision
    site: SiteConfig = field(default_factory=SiteConfig)

    @property
    def ranks_on_a_node(self) -> int:
        """Most ranks that one node holds."""
        return self.ranks_per_node or self.gpus_per_node or LOCAL_RANKS_WITHOUT_GPUS

    @property
    def queue(self) -> Optional[QueueConfig]:
        """The limits that hold for this run's jobs, where they are known."""
        for name in (self.qos, self.partition):
            if name is not None and name in self.site.queues:
                return self.site.queues[name]
        return None

    @property
    def cpus_per_rank(self) -> Optional[int]:
        """A rank's even share of the node's cores; None where those are unknown."""
        if self.cpus_per_node is None:
            return None
        return max(1, self.cpus_per_node // self.ranks_on_a_node)

    def nodes(self, ranks: int) -> int:
        """Nodes that `ranks` ranks take."""
        return -(-ranks // self.ranks_on_a_node)

    def memory(self, exclusive: bool, cpus: Optional[int] = None, gpus: int = 0) -> Optional[str]:
        """What `--mem` says of each node; None where it must not, or need not, be given.

        A job that has the node to itself takes all of its memory ("0"), as Slurm would otherwise
        give it the default of each core; one that shares the node takes its share.
        """
        if not self.site.memory_flag:
            return None
        if exclusive:
            return "0"
        if self.memory_gb is None:
            return None
        shares = [
            asked / of
            for asked, of in ((cpus, self.cpus_per_node), (gpus, self.gpus_per_node))
            if asked and of
        ]
        return f"{max(1, int(self.memory_gb * min(1.0, max(shares))))}G" if shares else None

    def stage_hours(self, gpu_hours: float, ranks: int) -> float:
        """Walltime of a stage that takes `gpu_hours` of an H100, on `ranks` of these GPUs."""
        return gpu_hours / (ranks * self.speed)

    def check(self) -> None:
        if self.executor not in EXECUTORS:
            raise ConfigError(
                f"cluster.executor={self.executor!r} is none of {', '.join(EXECUTORS)}"
            )
        if self.site.gpu_flag not in GPU_FLAGS:
            raise ConfigError(
                f"cluster.site.gpu_flag={self.site.gpu_flag!r} is none of {', '.join(GPU_FLAGS)}"
            )
        if self.speed <= 0:
            raise ConfigError(f"cluster.speed={self.speed}: it must be positive")
        if self.hours <= 0:
            raise ConfigError(f"cluster.hours={self.hours}: it must be positive")
        if not 0 <= self.stop_minutes * 2 < self.hours * 60:
            raise ConfigError(
                f"cluster.stop_minutes={self.stop_minutes} leaves too little of cluster.hours="
                f"{self.hours} to train in; it must be less than half"
            )
        for name in ("spare_segments", "restarts", "confirm_gpu_hours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cluster.{name}={getattr(self, name)}: it must not be negative")
