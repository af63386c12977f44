"""What the planner reasons about: one stage's network, layout, data and GPU, as plain values."""

from dataclasses import dataclass

from conf.schema import ClusterConfig, Config, ModelConfig, ParallelConfig, PrecisionConfig
from conf.schema.errors import ConfigError
from models.flops import MODULES
from models.pipeline_layout import chunk_layers
from tools.plan.workload import Row

# Streaming multiprocessors and dense BF16 TFLOP/s of the whole parts (NVIDIA's data sheets): how
# many of them a custom part has follows from its TFLOP/s.
H100_SMS, H100_TFLOPS = 132, 989.4
A100_SMS, A100_TFLOPS = 108, 312.0


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the node's links; rates by data sheet, bandwidths one way."""

    tflops: float  # dense BF16
    fp8_tflops: float | None
    bandwidth: float  # GB/s of its memory
    node_bandwidth: float  # GB/s
    network_bandwidth: float  # GB/s
    memory_gib: float  # as named ("64 GB"); what a job can use is a little less
    per_node: int
    hopper: bool
    # Matrix products run at the clock that the power limit leaves: 1 at 700 W (H100) or 400 W
    # (A100), less under a lower limit.
    clock: float = 1.0

    @property
    def sms(self) -> int:
        """Streaming multiprocessors."""
        whole, tflops = (H100_SMS, H100_TFLOPS) if self.hopper else (A100_SMS, A100_TFLOPS)
        return round(whole * self.tflops / tflops)


def gpu_of(cluster: ClusterConfig) -> Gpu:
    """The cluster's GPU.

    Raises:
        ConfigError: a fact that the prediction needs is not in the cluster's file.
    """
    names = ("gpu_tflops", "gpu_bandwidth", "node_bandwidth", "network_bandwidth", "gpu_memory_gb")
    missing = [f"cluster.{name}" for name in names if getattr(cluster, name) is None]
    if missing or not cluster.gpus_per_node:
        missing += [] if cluster.gpus_per_node else ["cluster.gpus_per_node"]
        raise ConfigError(
            f"no prediction for cluster={cluster.name}: {', '.join(missing)} not known; "
            "give them (ARGS), or plan for a cluster whose file has them (CLUSTER=mn5)"
        )
    return Gpu(
        tflops=cluster.gpu_tflops or 0.0,
        fp8_tflops=cluster.gpu_fp8_tflops,
        bandwidth=cluster.gpu_bandwidth or 0.0,
        node_bandwidth=cluster.node_bandwidth or 0.0,
        network_bandwidth=cluster.network_bandwidth or 0.0,
        memory_gib=cluster.gpu_memory_gb or 0.0,
        per_node=cluster.gpus_per_node,
        hopper=cluster.fp8,
    )


@dataclass(frozen=True)
class Software:
    """How the training program works; the defaults are this project's on GPUs.

    What other programs do differently, so that their published figures can be predicted too.
    """

    gated: bool = True  # SwiGLU (three matrices), or GELU (two)
    fused: bool = True  # norms, rotary embedding and activation one kernel each
    flash: int = 3  # generation of the attention kernels: 3 (also cuDNN 9) on Hopper, 2
    tensor_overlap: bool = False  # collectives of tensor parallelism hidden behind its products
    zero3: bool = False  # FSDP: weights sharded over the replicas, gathered layer by layer
    fused_gradients: bool = False  # weight gradients added to the FP32 buffer by the product
    # Shares of a layer's products, attention and element-wise kernels that are recomputed, where
    # that is none of `parallel.recompute`.
    recomputed: tuple[float, float, float] | None = None
    adapters: bool = False  # LoRA: frozen weights, everything passes gradients on
    chunked_loss: bool = True  # logits of tokens with a target only


@dataclass(frozen=True)
class Job:
    """One stage, ready to be predicted."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    trained: frozenset[str]  # of vision, connector, language
    row: Row  # one micro-batch of one replica
    micro_batches: int  # of a replica in a step
    layers: tuple[int, ...]  # decoder layers of each chunk; chunk i is on stage i % pipeline
    gpu: Gpu
    software: Software = Software()
    has_vision: bool = True

    @property
    def local_tokens(self) -> float:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.row.tokens / self.parallel.context

    @property
    def tiles_here(self) -> int:
        """Tiles of a micro-batch that one context-parallel rank puts through the tower."""
        return -(-round(self.row.tiles) // self.parallel.context)

    @property
    def gradients_pass(self) -> bool:
        """Whether the decoder has a backward pass at all."""
        return bool(self.trained) or self.software.adapters

    @property
    def learns_language(self) -> bool:
        return "language" in self.trained

    @property
    def bytes_per_weight(self) -> int:
        """Of the compute dtype."""
        return 2 if self.precision.params == "bf16" else 4

    def stage_layers(self, stage: int) -> int:
        """Decoder layers of one pipeline stage, all its chunks together."""
        return sum(self.layers[stage :: self.parallel.pipeline])


def trained_modules(config: Config) -> frozenset[str]:
    """Modules with a learning rate."""
    return frozenset(name for name in MODULES if getattr(config.stage.lr, name) > 0)


def job_of(config: Config, row: Row, layers: tuple[int, ...] | None = None) -> Job:
    """The stage of `config` on packs like `row` (one pack; a micro-batch holds several).

    Args:
        layers: decoder layers of each chunk, where they are known already.

    Raises:
        ConfigError: facts about the GPU are missing, or the pipeline's split does not add up.
    """
    stage, parallel = config.stage, config.parallel
    gpu = gpu_of(config.cluster)
    return Job(
        model=config.model,
        parallel=parallel,
        precision=config.precision,
        trained=trained_modules(config),
        row=row.times(stage.micro_batch_size),
        micro_batches=stage.global_batch_size // (stage.micro_batch_size * parallel.data),
        layers=layers or tuple(chunk_layers(config.model, parallel)),
        gpu=gpu,
        software=Software(flash=3 if gpu.hopper else 2),
    )
