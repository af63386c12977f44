"""Seconds of one optimizer step: pipeline of micro-batches, gradients, optimizer."""

from dataclasses import dataclass, field

from models.flops import ModuleFlops, forward_flops, training_flops
from tools.plan import layers, weights
from tools.plan.communication import (
    HIDDEN_COST,
    all_reduce_seconds,
    exposed,
    replica_group,
    ring_seconds,
    send_seconds,
    tensor_group,
)
from tools.plan.efficiency import stream_seconds
from tools.plan.job import Job
from tools.plan.layers import ELEMENT, Seconds

# Bytes moved per parameter by a step of Adam: gradient, master weight and moments read, weight,
# master and moments written; then with BF16 moments and the master weight's remainder.
ADAM = {"fp32": 30, "bf16": 20}
HOST_LINK = 25e9  # bytes a second of a GPU to its host, where the optimizer is left to the CPU
HOST_ADAM = 8e9  # parameters' bytes a second that a rank's share of the CPU updates (assumed)
STEP_OVERHEAD = 0.020  # seconds: data to the GPU, counts over all ranks, logging


@dataclass(frozen=True)
class Step:
    """One optimizer step, seconds."""

    compute: Seconds  # of the busiest stage, all micro-batches, without what is recomputed
    recompute: float
    bubble: float  # stages waiting for each other
    pipeline: float  # sends between stages that are seen
    gradients: float  # reductions of gradients, gathers of weights, as seen
    optimizer: float
    other: float
    flops: ModuleFlops = field(repr=False, default_factory=ModuleFlops)  # of the whole step
    tokens: float = 0.0  # real ones of the whole step
    row_tokens: float = 0.0  # padding included
    gpus: int = 1
    stages: tuple[float, ...] = ()  # seconds of a micro-batch on each pipeline stage

    @property
    def seconds(self) -> float:
        return (
            self.compute.total
            + self.recompute
            + self.bubble
            + self.pipeline
            + self.gradients
            + self.optimizer
            + self.other
        )

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens of samples per second and GPU."""
        return self.tokens / self.seconds / self.gpus

    @property
    def tflops_per_gpu(self) -> float:
        """What the model needs (models/flops.py), not what recomputation adds."""
        return self.flops.total / self.seconds / self.gpus / 1e12


def bf16_layers(job: Job) -> int:
    """Decoder layers whose products stay in BF16."""
    precision = job.precision
    if precision.fp8_recipe is None:
        return job.model.text.layers
    ends = precision.fp8_first_layers_bf16 + precision.fp8_last_layers_bf16
    return min(job.model.text.layers, ends)


@dataclass(frozen=True)
class _Stage:
    forward: Seconds
    backward: Seconds
    again: Seconds

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.again.total


def _stages(job: Job) -> list[_Stage]:
    text, pipeline = job.model.text, job.parallel.pipeline
    plain = layers.decoder_layer(job, fp8=False)
    quick = layers.decoder_layer(job, fp8=True) if job.precision.fp8_recipe else plain
    # The BF16 ones stand at both ends; as a mean they are as good in a sum over stages.
    share = bf16_layers(job) / text.layers
    stages = []
    for number in range(pipeline):
        count = job.stage_layers(number)
        slow, fast = share * count, (1 - share) * count
        forward = plain.forward * slow + quick.forward * fast
        backward = plain.backward * slow + quick.backward * fast
        again = layers.recomputed(job, plain, count) * share
        again += layers.recomputed(job, quick, count) * (1 - share)
        if number == 0:
            ahead, back, repeated = layers.vision(job)
            forward, backward, again = forward + ahead, backward + back, again + repeated
        if number == pipeline - 1:
            ahead, back = layers.head(job)
            forward, backward = forward + ahead, backward + back
        backward += Seconds(traffic=_accumulate(job, number))
        if not job.gradients_pass:
            again = Seconds()
        stages.append(_Stage(forward, backward, again))
    return stages


def _accumulate(job: Job, stage: int) -> float:
    """Weight gradients of one micro-batch added to the main buffer."""
    size = 8 if job.software.fused_gradients else 12
    return stream_seconds(job.gpu, size * weights.trained_count(job, stage))


def step(job: Job) -> Step:
    """The time of one step."""
    stages = _stages(job)
    parallel, count = job.parallel, job.micro_batches
    slowest = max(range(len(stages)), key=lambda number: stages[number].total)
    busiest = stages[slowest]
    waiting = sum(stage.total for stage in stages) - busiest.total
    bubble = waiting / parallel.virtual_pipeline
    if job.software.zero3:
        shared = _zero3(job, busiest)
    else:
        shared = _replicas(job, slowest, busiest)
    one = busiest.forward + busiest.backward
    return Step(
        compute=one * count,
        recompute=busiest.again.total * count,
        bubble=bubble,
        pipeline=_sends(job),
        gradients=shared,
        optimizer=_optimizer(job),
        other=STEP_OVERHEAD,
        flops=step_flops(job),
        tokens=job.row.real * count * parallel.data,
        row_tokens=job.row.tokens * count * parallel.data,
        gpus=parallel.world_size,
        stages=tuple(stage.total for stage in stages),
    )


def step_flops(job: Job) -> ModuleFlops:
    """What the model needs for one step: models/flops.py."""
    row = job.row
    document = max(1, round(row.document))
    number = row.real / document  # documents of the mean length, a fraction of one included
    one = forward_flops(job.model, [document], 0, 0)
    whole = forward_flops(job.model, [], round(row.targets), round(row.tiles))
    language = ModuleFlops(
        language=one.language * number, language_attention=one.language_attention * number
    )
    # Adapters let gradients pass through frozen weights, as a trained connector does.
    trained = set(job.trained) | ({"connector"} if job.software.adapters else set())
    forward = language + whole
    step_total = training_flops(forward, trained)
    scale = job.micro_batches * job.parallel.data
    return ModuleFlops(**{name: value * scale for name, value in vars(step_total).items()})


def _sends(job: Job) -> float:
    """Hidden states between stages: seen one by one without virtual stages, else overlapped."""
    parallel = job.parallel
    if parallel.pipeline == 1:
        return 0.0
    size = ELEMENT * job.local_tokens * job.model.text.hidden_size
    size /= parallel.tensor if parallel.sequence_parallel else 1
    both = 2 * send_seconds(job, size) * job.micro_batches
    if parallel.virtual_pipeline == 1:
        return both
    return HIDDEN_COST * both * parallel.virtual_pipeline


def _replicas(job: Job, stage: int, busiest: _Stage) -> float:
    """Gradients to the optimizer's shards and weights back, beside the ends of the step."""
    parallel, gpu = job.parallel, job.gpu
    ranks, trained = replica_group(job), weights.trained_count(job, stage)
    if ranks.size == 1 or not trained:
        return 0.0
    element = 4 if job.precision.grad_reduce_in_fp32 else job.bytes_per_weight
    if not parallel.distributed_optimizer:
        reduced = all_reduce_seconds(gpu, ranks, element * trained)
        behind = busiest.backward.total if parallel.overlap_grad_reduce else 0.0
        return exposed(reduced, behind)
    scattered = ring_seconds(gpu, ranks, element * trained)
    gathered = ring_seconds(gpu, ranks, job.bytes_per_weight * trained)
    # Only the last micro-batch's backward pass and the first one's forward pass can hide them.
    return exposed(
        scattered, busiest.backward.total if parallel.overlap_grad_reduce else 0.0
    ) + exposed(gathered, busiest.forward.total if parallel.overlap_param_gather else 0.0)


def _zero3(job: Job, busiest: _Stage) -> float:
    """FSDP: every micro-batch gathers the weights twice and scatters its gradients."""
    ranks, gpu = replica_group(job), job.gpu
    held = sum(part.count for part in weights.stage_parts(job, 0))
    trained = weights.trained_count(job, 0)
    element = 4 if job.precision.grad_reduce_in_fp32 else 2
    gathered = ring_seconds(gpu, ranks, 2 * held)
    scattered = ring_seconds(gpu, ranks, element * trained)
    first = gathered / job.model.text.layers  # nothing runs before the first layer's weights
    forward = exposed(gathered, busiest.forward.total)
    backward = exposed(gathered + scattered, busiest.backward.total + busiest.again.total)
    return (first + forward + backward) * job.micro_batches


def _optimizer(job: Job) -> float:
    """Gradient norm, Adam, and zeroing the gradients, on the rank that has most."""
    parallel, gpu = job.parallel, job.gpu
    most = max(weights.trained_count(job, number) for number in range(parallel.pipeline))
    shards = replica_group(job).size if parallel.distributed_optimizer or job.software.zero3 else 1
    mine = most / shards
    element = 4 if job.precision.grad_reduce_in_fp32 else job.bytes_per_weight
    cpu = parallel.optimizer_offload * mine
    on_gpu = stream_seconds(gpu, (mine - cpu) * (ADAM[parallel.optimizer_states] + 4))
    on_gpu += stream_seconds(gpu, element * most / (shards if job.software.zero3 else 1))
    on_cpu = cpu * (element + 2) / HOST_LINK + 4 * cpu / HOST_ADAM
    norm = all_reduce_seconds(gpu, tensor_group(job), 4) + 1e-4
    return on_gpu + on_cpu + norm
