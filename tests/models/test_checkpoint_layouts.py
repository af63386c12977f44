"""torch_dist checkpoints saved under one layout and read under another, by Megatron's own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from conf.schema import ModelConfig, ParallelConfig
from tests.distributed import megatron, run_ranks
from tests.models.shards import gather_shards
from tests.models.tiny import documents, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import build_loaded

LENGTH = 512
TP2_SP = ParallelConfig(2, tensor=2, sequence_parallel=True)
LAYOUTS = {
    "TP1": ParallelConfig(1),
    "PP2": ParallelConfig(2, pipeline=2),
    "PP2 uneven": ParallelConfig(2, pipeline=2, pipeline_layers=[3, 1]),
    "DP2": ParallelConfig(2),
}


class Trainer:
    """Model, DDP and distributed AdamW of one rank, fed the same micro-batch every step."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, state: dict) -> None:
        self.built = build_loaded(model, parallel, state)
        config = self.built.config
        self.wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            self.built,
        )
        config.finalize_model_grads_func = finalize_model_grads
        recipe = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.0,
            clip_grad=1.0,
            use_distributed_optimizer=True,
            params_dtype=torch.float32,
        )
        self.optimizer = get_megatron_optimizer(recipe, [self.wrapped])

    def train(self, batch: dict[str, Any], steps: int) -> None:
        inputs = {name: value for name, value in batch.items() if name != "loss_mask_T"}
        mask_T = batch["loss_mask_T"]

        def forward(batches: Any, module: Any) -> Any:
            next(batches)
            return module(**inputs), lambda losses_T: (
                (losses_T * mask_T).sum(),
                mask_T.sum().to(torch.int),
                {},
            )

        for _ in range(steps):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([None]),
                model=[self.wrapped],
                num_microbatches=1,
                seq_length=LENGTH,
                micro_batch_size=1,
                forward_only=False,
            )
            self.optimizer.step()

    def sharded(self, loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state: dict[str, Any] = {"model": self.built.sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state["model"], is_loading=loading, metadata=metadata
        )
        return state


def save_worker(
    model: ModelConfig, parallel: ParallelConfig, state: dict, batch: dict, path: str
) -> tuple[dict, dict]:
    """Whole weights when saved, after two steps, and after two more."""
    with megatron(parallel):
        trainer = Trainer(model, parallel, state)
        trainer.train(batch, 2)
        dist_checkpointing.save(trainer.sharded(loading=False), path)
        saved = gather_shards(trainer.built, "data")
        trainer.train(batch, 2)
        return saved, gather_shards(trainer.built, "data")


def load_worker(
    model: ModelConfig, parallel: ParallelConfig, state: dict, batch: dict, path: str
) -> tuple[dict, dict]:
    """The same from the checkpoint; the weights begin as something else."""
    with megatron(parallel):
        trainer = Trainer(model, parallel, {n: torch.full_like(t, 0.5) for n, t in state.items()})
        loaded = dist_checkpointing.load(trainer.sharded(loading=True), path)
        trainer.built.load_state_dict(loaded["model"])
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        found = gather_shards(trainer.built, "data")
        trainer.train(batch, 2)
        return found, gather_shards(trainer.built, "data")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    model = tiny_model()
    state = megatron_state(hf_twin(model), model)
    batch = micro_batch(model, [documents(model)[:4]], LENGTH)
    path = Path(tmp_path_factory.mktemp("checkpoint"))
    answers = run_ranks(2, save_worker, model, TP2_SP, state, batch, str(path))
    return model, state, batch, path, answers[0]


def test_saved_weights_are_the_trained_ones(saved: tuple) -> None:
    model, state, _, _, (weights, later) = saved
    assert set(weights) == set(state)
    moved = {name for name in state if not torch.equal(weights[name], state[name])}
    still = {n for n in state if n.startswith(("vision_tower.unused", "vision_tower.post"))}
    assert moved == set(state) - still  # everything that runs has learnt, nothing else moved
    assert any(not torch.equal(later[name], weights[name]) for name in moved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_of_tp2_continues(layout: str, saved: tuple) -> None:
    """Weights are read bit for bit; two more steps, hence AdamW's state, agree too.

    The steps are compared in relative norm, a thousandth: AdamW divides a gradient by its own size,
    so that rounding shows where a gradient is zero but for rounding (key biases).
    """
    model, state, batch, path, (weights, later) = saved
    parallel = LAYOUTS[layout]
    answers = run_ranks(parallel.world_size, load_worker, model, parallel, state, batch, str(path))
    found = {name: tensor for some, _ in answers for name, tensor in some.items()}
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
    further = {name: tensor for _, some in answers for name, tensor in some.items()}
    worst = max(float((further[n] - later[n]).norm() / later[n].norm()) for n in later)
    print(f"{layout}: after two more steps, worst relative difference {worst:.1e}")
    assert worst < 1e-3
