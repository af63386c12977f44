"""What a stage holds: one network, gradients and optimizer state of what it trains only."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from conf.schema import Config
from tests.distributed import run_ranks
from tests.pipeline.small_run import SmallRun

if TYPE_CHECKING:
    from pipeline.distributed import Ranks
    from pipeline.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """Of one rank, after one step; numbers of elements."""

    built: int  # networks made since the process began the stage
    alive: int  # networks there are now
    parameters: int  # of every parameter there is in the process
    network: int  # of the network's parameters
    trainable: int
    grad_buffers: int
    states: int  # of Adam's two moments
    grads: int  # `.grad` or `main_grad` of frozen parameters


@contextlib.contextmanager
def first_step(config: Config) -> Iterator[tuple[Trainer, Ranks]]:
    """What the training command does up to and including its first step."""
    from pipeline.data import open_data
    from pipeline.distributed import session
    from pipeline.model import build_training_model
    from pipeline.objectives import build_objective
    from pipeline.step import train_step
    from pipeline.trainer import Trainer

    with session(config.parallel, config.stage.seed) as ranks:
        data = open_data(config, ranks)
        stage_dir = Path(config.runs_dir) / config.run / config.stage.name
        trainer = Trainer(config, ranks, data, build_training_model(config), stage_dir)
        objective = build_objective(trainer)
        trainer.begin()
        _, batches = next(iter(data.batches(0)))
        train_step(
            trainer.models, trainer.optimizer, objective, batches, config.stage, ranks.device
        )
        yield trainer, ranks


def step_worker(config: Config) -> Held:
    """On one rank."""
    from models.llava_next import LlavaNext

    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter)}
    built, init = [0], LlavaNext.__init__

    def counted(self: LlavaNext, *args: object, **named: object) -> None:
        built[0] += 1
        init(self, *args, **named)  # type: ignore[arg-type]

    LlavaNext.__init__ = counted  # type: ignore[method-assign]
    try:
        with first_step(config) as (trainer, _):
            (model,) = trainer.models
            own = list(model.module.parameters())
            things = [thing for thing in gc.get_objects() if id(thing) not in before]
            states = trainer.optimizer.optimizer.state.values()  # type: ignore[attr-defined]
            frozen = [p for p in own if not p.requires_grad]
            return Held(
                built=built[0],
                alive=sum(isinstance(thing, LlavaNext) for thing in things),
                parameters=sum(t.numel() for t in things if isinstance(t, torch.nn.Parameter)),
                network=sum(p.numel() for p in own),
                trainable=sum(p.numel() for p in own if p.requires_grad),
                grad_buffers=sum(int(buffer.grad_data.numel()) for buffer in model.buffers),
                states=sum(s[k].numel() for s in states for k in ("exp_avg", "exp_avg_sq")),
                grads=sum(p.grad is not None or hasattr(p, "main_grad") for p in frozen),
            )
    finally:
        LlavaNext.__init__ = init  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_one_network_and_no_more_than_it_trains(
    small_run: SmallRun, trained: dict[str, str], stage: str
) -> None:
    """Stage 3 too, whose reference log-probabilities are computed in the same process."""
    config = small_run.config(stage, run=f"held-{stage}")
    before = {"stage1": "import", "stage3": "stage2"}[stage]
    config.init_from = str(small_run.root / "run" / before)
    (held,) = run_ranks(1, step_worker, config)
    assert (held.built, held.alive) == (1, 1)
    assert held.parameters == held.network
    assert 0 < held.trainable < held.network
    assert held.trainable <= held.grad_buffers < held.network  # buffers are aligned
    assert held.states == 2 * held.trainable
    assert held.grads == 0


def test_pipeline_stage_with_nothing_to_train_holds_nothing_for_it(
    small_run: SmallRun, trained: dict[str, str]
) -> None:
    """Stage 1 on two pipeline ranks: connector on the first, a frozen half decoder on the last."""
    config = small_run.config("stage1", "parallel.world_size=2", "parallel.pipeline=2", run="held2")
    first, last = run_ranks(2, pipeline_worker, config)
    assert first == (True, True, True, 0)
    assert last == (False, False, False, 0)


def pipeline_worker(config: Config) -> tuple[bool, bool, bool, int]:
    """Whether it is the first stage, trains and has buffers; gradients on frozen parameters."""
    with first_step(config) as (trainer, ranks):
        (model,) = trainer.models
        own = list(model.module.parameters())
        trains = any(p.requires_grad for p in own)
        grads = sum(p.grad is not None for p in own if not p.requires_grad)
        return ranks.first_stage, trains, bool(model.buffers), grads
