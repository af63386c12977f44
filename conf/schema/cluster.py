"""Where a job runs: the machine's shape, the site's rules, and what this run asks of them."""

from dataclasses import dataclass, field
from typing import Any, Optional

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
    single_qos: Optional[str] = None  # of such a job, where the run's QoS takes many nodes only
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
    # Of one GPU, by data sheet; null where unknown, and then no MFU and no prediction.
    gpu_tflops: Optional[float] = None  # dense BF16 matrix products, TFLOP/s
    gpu_fp8_tflops: Optional[float] = None
    gpu_bandwidth: Optional[float] = None  # of its memory, GB/s
    node_bandwidth: Optional[float] = None  # to the other GPUs of its node, GB/s one way
    network_bandwidth: Optional[float] = None  # its share of the node's network, GB/s one way
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
    # Without a step for so long, or five times the slowest step: a hang, which ends the job with
    # every rank's stacks; 0 never. A save may take three times as long.
    hang_minutes: float = 10.0
    spare_segments: int = 1  # beyond those that the stage is expected to need
    restarts: int = 2  # times that a failed segment starts its ranks again in the same job
    exclusive: bool = True
    python: Optional[str] = None  # interpreter of the jobs; null: the one that submits
    preflight: bool = True
    confirm_gpu_hours: float = 100.0  # a plan above this is confirmed by hand, or with yes=true

    # What is meant where `parallel=` or `precision=` is not given; conf/compose.py looks these up.
    # model -> stage -> parallel. (Any: OmegaConf cannot merge typed dictionaries of dictionaries.)
    layouts: dict[str, Any] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)  # model -> precision
    site: SiteConfig = field(default_factory=SiteConfig)

    def __post_init__(self) -> None:
        for name in ("account", "qos", "partition", "reservation"):
            if not getattr(self, name):  # exported, but empty
                setattr(self, name, None)

    @property
    def ranks_on_a_node(self) -> int:
        """Most ranks that one node holds."""
        return self.ranks_per_node or self.gpus_per_node or LOCAL_RANKS_WITHOUT_GPUS

    @property
    def queue_name(self) -> Optional[str]:
        """The QoS or partition whose limits hold for this run's jobs; None where none is listed."""
        return self.listed(self.qos)

    @property
    def queue(self) -> Optional[QueueConfig]:
        """The limits that hold for this run's jobs, where they are known."""
        return None if self.queue_name is None else self.site.queues[self.queue_name]

    def qos_of(self, nodes: int) -> Optional[str]:
        """QoS of a job of `nodes` nodes: another one where the run's own is for larger jobs."""
        queue = self.queue
        too_few = queue is not None and nodes < queue.min_nodes
        return self.site.single_qos if too_few and self.site.single_qos else self.qos

    def queue_of(self, nodes: int) -> Optional[QueueConfig]:
        """Limits that hold for a job of `nodes` nodes, where they are known."""
        name = self.listed(self.qos_of(nodes))
        return None if name is None else self.site.queues[name]

    def listed(self, qos: Optional[str]) -> Optional[str]:
        """The QoS, else the partition, if `site.queues` knows its limits."""
        return next((n for n in (qos, self.partition) if n and n in self.site.queues), None)

    def nodes(self, ranks: int) -> int:
        """Nodes that `ranks` ranks take."""
        return -(-ranks // self.ranks_on_a_node)

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
        for name in ("hang_minutes", "spare_segments", "restarts", "confirm_gpu_hours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cluster.{name}={getattr(self, name)}: it must not be negative")
