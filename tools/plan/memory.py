"""Bytes of GPU memory by part, for each pipeline stage; whether they fit."""

from dataclasses import dataclass, fields

from tools.plan import activations, weights
from tools.plan.communication import replica_group
from tools.plan.job import Job
from tools.plan.step import bf16_layers

GIB = 1024**3
# What the driver leaves of the nominal memory: 63.3 of 64 GiB on MareNostrum 5's H100, 79.1-79.6
# of 80, 39.4-39.6 of 40, 140.4 of "141 GB".
USABLE = 0.985
# Kept free of a plan: the allocator cannot use every gap.
HEADROOM = 0.04
CONTEXT = 0.75 * GIB  # CUDA context, kernels of cuBLAS, cuDNN and Transformer Engine; assumed
WORKSPACE = 0.25 * GIB  # cuBLAS (32 MiB a stream), fused attention, quantisation; assumed
COMMUNICATOR = 0.25 * GIB  # NCCL's buffers of one group (channels x 4 MiB, both ways); assumed
FRAGMENTS = 0.06  # of what is allocated and freed in each step; assumed
# Bytes of the optimizer per parameter: FP32 master weight and two moments; BF16 moments and the
# 16 bits that a BF16 weight lacks (`store_param_remainders`).
STATES = {"fp32": 12, "bf16": 6}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of one pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    vision: float  # tower, connector and embedded tokens
    working: float  # of the kernels: gathered inputs, gradients on their way
    communication: float
    reserve: float  # context, workspaces, fragments

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def stage_memory(job: Job, stage: int) -> Memory:
    """One rank of a pipeline stage at its fullest moment."""
    parts = weights.stage_parts(job, stage)
    trained = weights.trained_count(job, stage)
    last = stage == job.parallel.pipeline - 1
    fp8_share = 0.0
    if job.precision.fp8_recipe:
        fp8_share = 1 - bf16_layers(job) / job.model.text.layers
    gradients: float = trained * (4 if job.precision.grad_reduce_in_fp32 else job.bytes_per_weight)
    sharded = replica_group(job).size
    kept = activations.decoder(job, stage, fp8_share)
    seen = activations.vision(job) if stage == 0 else 0.0
    logits = activations.logits(job) if last else 0.0
    working = activations.working(job) + activations.largest_gradient(job, stage)
    held = _weights(job, parts, fp8_share)
    if job.software.zero3:
        held, gradients = held / sharded, gradients / sharded
        # Two layers' weights gathered, and one layer's gradients.
        working += 4 * held * sharded / max(1, job.model.text.layers) * 2
    communicators = 1 + sum(
        size > 1
        for size in (
            job.parallel.tensor,
            job.parallel.context,
            job.parallel.pipeline,
            job.parallel.data * job.parallel.context,
        )
    )
    moving = kept + seen + logits + working
    return Memory(
        weights=held,
        gradients=gradients,
        optimizer=_optimizer(job, trained, sharded),
        activations=kept,
        logits=logits,
        vision=seen,
        working=working,
        communication=communicators * COMMUNICATOR if job.parallel.world_size > 1 else 0.0,
        reserve=CONTEXT + WORKSPACE + FRAGMENTS * moving,
    )


def _weights(job: Job, parts: list[weights.Part], fp8_share: float) -> float:
    total = 0.0
    for part in parts:
        size: float = job.bytes_per_weight * part.count
        if part.matrix and fp8_share:
            # Copies by rows and by columns for the products; with fp8_params they are the weights.
            copies = 2.0 * part.count * fp8_share
            size = size * (1 - fp8_share) + copies if job.precision.fp8_params else size + copies
        total += size
    return total


def _optimizer(job: Job, trained: int, sharded: int) -> float:
    parallel = job.parallel
    if job.bytes_per_weight == 2:
        each = STATES[parallel.optimizer_states]
        # FP8 weights have no BF16 part to complete: the master weights stay whole.
        if parallel.optimizer_states == "bf16" and job.precision.fp8_params:
            each = 8
    else:
        each = 8  # the weights are their own masters
    shards = sharded if parallel.distributed_optimizer or job.software.zero3 else 1
    return each * trained / shards * (1 - parallel.optimizer_offload)


@dataclass(frozen=True)
class Fit:
    """The fullest rank beside what its GPU has."""

    stage: int
    memory: Memory
    usable: float  # bytes

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable * (1 - HEADROOM)

    @property
    def share(self) -> float:
        """Of what can be used."""
        return self.memory.total / self.usable


def usable_bytes(job: Job) -> float:
    """What a job can allocate on its GPU."""
    return job.gpu.memory_gib * GIB * USABLE


def fits(job: Job) -> bool:
    """`fit(job).fits`, sooner where it does not."""
    most = usable_bytes(job) * (1 - HEADROOM)
    last = job.parallel.pipeline - 1
    order = dict.fromkeys((0, last, *range(1, last)))
    return all(stage_memory(job, stage).total <= most for stage in order)


def fit(job: Job) -> Fit:
    """The pipeline stage that needs most."""
    sizes = [stage_memory(job, stage) for stage in range(job.parallel.pipeline)]
    worst = max(range(len(sizes)), key=lambda stage: sizes[stage].total)
    return Fit(worst, sizes[worst], usable_bytes(job))
