"""Checkpoints hold Transformer Engine's extra state where a resumed run needs it, else none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conf.schema import ParallelConfig, PrecisionConfig
from models import extra_state
from tests.distributed import megatron, run_ranks
from tests.models.tiny import tiny_model


@pytest.mark.parametrize(
    ("fp8", "recipe", "needed"),
    [(None, "delayed", False), ("hybrid", "tensorwise", False), ("hybrid", "delayed", True)],
)
def test_only_delayed_fp8_has_one_to_keep(fp8: str | None, recipe: str, needed: bool) -> None:
    config: Any = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)  # Megatron's recipe has a default
    assert extra_state.is_needed(config) is needed


def local_layers_worker() -> tuple[list[str], list[str]]:
    from models.build import build_model

    with megatron(ParallelConfig()):
        network = build_model(
            tiny_model(), ParallelConfig(), PrecisionConfig(), pre_process=True, post_process=True
        )
        state = network.state_dict()
        before = [key for key in state if key.endswith("_extra_state")]
        extra_state.leave_out(state)
        after = [key for key in state if "extra" in key]
        extra_state.fill_in(network, state)
        network.load_state_dict(state)
        return before, after


def test_a_network_loads_without_its_own() -> None:
    ((before, after),) = run_ranks(1, local_layers_worker)
    assert any("linear_qkv" in key for key in before)
    assert not after


class Counting(nn.Module):
    """A module with an extra state, as Transformer Engine's have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        self.seen.append(state)


def test_what_is_there_is_not_replaced() -> None:
    network = nn.Sequential(Counting(), nn.Linear(2, 2), Counting())
    state = dict(network.state_dict())
    del state["2._extra_state"]
    with pytest.raises(RuntimeError, match=r"2\._extra_state"):
        network.load_state_dict(state)
    extra_state.fill_in(network, state)
    network.load_state_dict(state)
    first, _, last = network
    assert torch.equal(first.seen[-1], torch.zeros(1)) and last.seen == [None]
