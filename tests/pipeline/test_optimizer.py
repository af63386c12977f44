"""AdamW with BF16 weights, alone and split over replicas, against torch's on FP32 weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from pipeline import optimizer as ours
from pipeline.optimizer_state import _distributed, _owned
from tests.distributed import megatron, run_ranks
from tests.pipeline.tiny_state import STAGE, one_step, tiny_state

BF16 = PrecisionConfig(params="bf16")
RECIPE = OptimizerConfig(weight_decay=0.1, clip_grad=0.05, warmup_ratio=0.25)
RATES = {"vision_tower": "vision", "connector": "connector", "image_newline": "connector"}
STEPS = 3
# The norm of all gradients, by which they are clipped, is summed up in another order.
TOLERANCE = 1e-6


class Twin:
    """torch.optim.AdamW on FP32 copies, its rates and gradients those of `one_step`."""

    def __init__(self, named: dict[str, torch.nn.Parameter]) -> None:
        self.masters = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
        self.groups = {
            name: {
                "params": [weight],
                "rate": getattr(STAGE.lr, RATES.get(name.split(".")[0], "language")),
                "weight_decay": 0.0 if weight.dim() == 1 else RECIPE.weight_decay,
            }
            for name, weight in self.masters.items()
        }
        betas = (RECIPE.beta1, RECIPE.beta2)
        self.adamw = torch.optim.AdamW(list(self.groups.values()), betas=betas, eps=RECIPE.eps)

    def step(self, number: int, share: float) -> None:
        """`share` of the peak rates."""
        for group in self.adamw.param_groups:
            group["lr"] = group["rate"] * share
        for weight in self.masters.values():
            places = torch.arange(weight.numel()).view(weight.shape)
            weight.grad = torch.cos(places * 0.37 + number) * 1e-2
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), RECIPE.clip_grad)
        self.adamw.step()


def _against_torch(parallel: ParallelConfig) -> tuple[float, int, float]:
    """Largest difference of the master weights; weights that are not their masters in BF16; sum."""
    with megatron(parallel):
        state = tiny_state(parallel, BF16, 0, replace(STAGE, optimizer=RECIPE))
        assert state.optimizer is not None
        named = {n: p for n, p in state.models[0].named_parameters() if p.requires_grad}
        assert {p.dtype for p in named.values()} == {torch.bfloat16}
        names = {id(p): n for n, p in named.items()}
        twin = Twin(named)
        for number in range(STEPS):
            group: Any = state.optimizer.param_groups[0]
            share = group["lr"] / group["max_lr"]
            one_step(state)
            twin.step(number, share)
        inner = _distributed(state.optimizer)
        largest, wrong = 0.0, 0
        for name, param in named.items():
            if inner is None:
                parts = [(0, param.numel(), param.main_param.view(-1))]
            else:
                mine = [of for of in _owned(inner) if names[id(of.param)] == name]
                parts = [(of.start, of.stop, of.shard.detach()) for of in mine]
            for start, stop, master in parts:
                wanted = twin.masters[name].detach().view(-1)[start:stop]
                largest = max(largest, float((master - wanted).abs().max()))
                held = param.detach().view(-1)[start:stop]
                wrong += int((held != master.bfloat16()).sum())
        return largest, wrong, float(sum(p.double().sum() for p in named.values()))


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(1), ParallelConfig(2, distributed_optimizer=True)]
)
def test_bf16_weights_follow_fp32_masters(parallel: ParallelConfig) -> None:
    found = run_ranks(parallel.world_size, _against_torch, parallel)
    for largest, wrong, _ in found:
        assert largest <= TOLERANCE and wrong == 0
    assert len({total for *_, total in found}) == 1  # replicas hold the same weights


def test_settings_that_save_memory() -> None:
    """What Megatron is told; it runs on GPUs only."""
    none = ours._memory(ParallelConfig(), BF16)
    assert none == {}
    states = ours._memory(ParallelConfig(optimizer_states="bf16"), BF16)
    assert states["use_precision_aware_optimizer"]
    assert states["exp_avg_dtype"] == states["exp_avg_sq_dtype"] == torch.bfloat16
    assert "fp8_recipe" not in states  # the master weights are then 16-bit remainders
    fp8 = replace(BF16, fp8_recipe="tensorwise", fp8_params=True)
    assert ours._memory(ParallelConfig(), fp8) == {"fp8_recipe": "tensorwise"}
    some = ours._memory(ParallelConfig(optimizer_offload=0.5), BF16)
    assert (some["optimizer_cpu_offload"], some["optimizer_offload_fraction"]) == (True, 0.5)
