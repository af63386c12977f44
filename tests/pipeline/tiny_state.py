"""The state of a tiny training run, trained on gradients that no layout changes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from conf.schema import LearningRates, ParallelConfig, PrecisionConfig, StageConfig
from models.build import build_chunks
from pipeline.checkpoint import TrainingState
from pipeline.model import wrap_chunks
from pipeline.optimizer import build_optimizer, build_schedule
from pipeline.optimizer_state import _owned
from tests.models.tiny import tiny_model

STAGE = StageConfig(
    name="stage2",
    number=2,
    objective="sft",
    lr=LearningRates(vision=1e-3, connector=2e-3, language=1e-2),
    sequence_length=64,
    global_batch_size=1,
    steps=4,
)


def tiny_state(
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    steps: int,
    stage: StageConfig = STAGE,
) -> TrainingState:
    """Model and optimizer after `steps` steps, inside `tests.distributed.megatron(parallel)`."""
    torch.manual_seed(7)
    chunks = build_chunks(tiny_model(), parallel, precision)
    models = wrap_chunks(chunks, parallel, precision)
    optimizer = build_optimizer(models, stage, parallel, precision)
    schedule = build_schedule(optimizer, stage, 4)
    state = TrainingState(chunks, optimizer, schedule, {}, "", "", "")
    for _ in range(steps):
        one_step(state)
    return state


def one_step(state: TrainingState) -> None:
    """An optimizer step on made-up gradients."""
    assert state.optimizer is not None and state.schedule is not None
    for chunk in state.models:
        for param in chunk.parameters():
            if param.requires_grad:
                places = torch.arange(param.numel()).view(param.shape)
                param.main_grad.copy_(torch.cos(places * 0.37 + state.step) * 1e-2)
    state.optimizer.step()
    state.schedule.step(1)
    state.step += 1


def tensors(state: TrainingState, copies: bool = True) -> list[torch.Tensor]:
    """What this rank holds: weights by name, then master weights and moments of each."""
    assert state.optimizer is not None
    inner: Any = state.optimizer.chained_optimizers[0]
    # By name: the vision tower's order of modules changes when it is asked for its state.
    named = sorted((name, p) for chunk in state.models for name, p in chunk.named_parameters())
    held = [param.detach() for _, param in named]
    if isinstance(inner, DistributedOptimizer):
        owned = [(of.shard, of.state) for of in _owned(inner)]
    else:
        owned = [(p, inner.optimizer.state[p]) for _, p in named if p.requires_grad]
    for shard, of in owned:
        held += [shard.detach(), of["exp_avg"], of["exp_avg_sq"]]
    return [tensor.clone() for tensor in held] if copies else held


def largest_difference(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Over all elements; NaN where one is."""
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True) if a.numel())
