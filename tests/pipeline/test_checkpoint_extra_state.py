"""Which checkpoints hold Transformer Engine's extra state, and what loading gives back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.schema import ParallelConfig, PrecisionConfig
from models.build import build_model
from pipeline import checkpoint
from tests.distributed import megatron, run_ranks
from tests.models.tiny import tiny_model


def built(seed: int) -> Any:
    torch.manual_seed(seed)
    return build_model(
        tiny_model(), ParallelConfig(), PrecisionConfig(), pre_process=True, post_process=True
    )


def entries(network: Any, optimizer: Any, loading: bool) -> int:
    """Extra states among what is saved, or asked for."""
    state = checkpoint.TrainingState([network], optimizer, None, {}, "", "", "")
    (chunk,) = state.sharded(loading, with_rng=False)["model"].values()
    return sum(key.endswith("_extra_state") for key in chunk)


def worker() -> dict[str, int]:
    with megatron(ParallelConfig()):
        network, trained = built(1), object()
        found = {"plain": entries(network, trained, loading=False)}
        # Local layers have the same entries as Transformer Engine's, empty ones.
        network.config.fp8, network.config.fp8_recipe = "hybrid", "tensorwise"
        found["tensorwise"] = entries(network, trained, loading=False)
        network.config.fp8_recipe = "delayed"
        found["delayed"] = entries(network, trained, loading=False)
        found["delayed, resumed"] = entries(network, trained, loading=True)
        found["delayed, a stage's beginning"] = entries(network, None, loading=True)
        return found


def test_only_a_resumed_delayed_run_reads_one() -> None:
    (found,) = run_ranks(1, worker)
    layers = tiny_model().text.layers
    assert found.pop("delayed") == found.pop("delayed, resumed") >= 4 * layers
    assert set(found.values()) == {0} and len(found) == 3


def read_worker(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with megatron(ParallelConfig()):
        source, network = built(1), built(2)
        state = checkpoint.TrainingState([source], None, None, {}, "", "", "")
        read = checkpoint.load_model([network], checkpoint.save(state, Path(folder), keep=1))
        names = dict(network.named_parameters())
        saved = {name: p.detach().clone() for name, p in source.named_parameters()}
        assert all(torch.equal(names[name], saved[name]) for name in saved)
        return saved, {name: read["model"][name] for name in saved}


def test_loading_gives_back_what_was_read(tmp_path: Path) -> None:
    """FP8 weights are rounded when loaded; the optimizer's master copy is made of these."""
    ((saved, read),) = run_ranks(1, read_worker, str(tmp_path))
    assert saved and all(torch.equal(read[name], saved[name]) for name in saved)
