"""One global batch through Megatron's pipeline schedule, and one optimizer step."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from conf.schema import StageConfig
from data_shards.batch import PackedBatch
from pipeline.batch import DeviceBatch
from pipeline.objectives.base import ForwardStepFunction, Objective
from pipeline.timers import COMMUNICATION, OPTIMIZER, StepTimers


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch's terms (target tokens, or preference pairs)."""

    values: dict[str, float]  # "loss" and whatever else the objective reports
    terms: int
    grad_norm: float


def _device_batches(
    micro_batches: Sequence[PackedBatch], device: torch.device
) -> Iterator[DeviceBatch]:
    for batch in micro_batches:
        yield DeviceBatch.from_packed(batch, device)


def run_schedule(
    models: Sequence[torch.nn.Module],
    objective: Objective,
    micro_batches: Sequence[PackedBatch],
    stage: StageConfig,
    device: torch.device,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Forward (and backward) of this replica's micro-batches; reports on the last stage only.

    `models` are this rank's chunks of the network. Each reads every micro-batch, which is on the
    device once, from the first chunk's turn to the last's.
    """
    batches = itertools.tee(_device_batches(micro_batches, device), len(models))
    return get_forward_backward_func()(
        forward_step_func=ForwardStepFunction(objective),
        data_iterator=list(batches),
        model=list(models),
        num_microbatches=len(micro_batches),
        seq_length=stage.sequence_length * stage.micro_batch_size,
        micro_batch_size=1,  # a micro-batch is one row, its packs laid end to end
        forward_only=forward_only,
    )


def _global_sums(reports: list[dict[str, torch.Tensor]], names: list[str]) -> torch.Tensor:
    """Sum over micro-batches, then data and context ranks, known to every pipeline stage."""
    sums = torch.zeros(len(names), dtype=torch.float64)
    for report in reports:
        sums += torch.tensor([float(report[name]) for name in names], dtype=torch.float64)
    sums = sums.to("cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(
        sums,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return sums.cpu()


def train_step(
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    objective: Objective,
    micro_batches: Sequence[PackedBatch],
    stage: StageConfig,
    device: torch.device,
    timers: StepTimers | None = None,
) -> StepResult:
    """Gradients of one global batch, clipped, applied.

    Raises:
        FloatingPointError: the loss or the gradient norm is not finite. Stop then: the weights
            may be spoilt, the last checkpoint is not.
    """
    timers = timers or StepTimers()
    with timers(OPTIMIZER):
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
    reports = run_schedule(models, objective, micro_batches, stage, device, forward_only=False)
    names = list(objective.reported)
    with timers(COMMUNICATION):
        *sums, terms = _global_sums(reports, [*names, "terms"]).tolist()
    values = {name: total / max(terms, 1.0) for name, total in zip(names, sums, strict=True)}
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(f"the loss is not finite ({values}); lower stage.lr")
    with timers(OPTIMIZER):
        _, grad_norm, _ = optimizer.step()
    if grad_norm is not None and not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; lower stage.lr")
    return StepResult(values=values, terms=int(terms), grad_norm=float(grad_norm or 0.0))
