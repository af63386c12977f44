"""The whole network in this one process: how import, export and evaluation see a checkpoint."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from pipeline.distributed import session
from slurm.local import free_port

if TYPE_CHECKING:
    from models.llava_next import LlavaNext


@contextmanager
def whole_model(
    model: ModelConfig, precision: PrecisionConfig, seed: int = 1234
) -> Iterator["LlavaNext"]:
    """An unsharded `LlavaNext` (TP 1, PP 1) in a process group of one.

    On the GPU when there is one, else on the CPU; dtype from `precision.params`.
    """
    # Here, so that pipeline.distributed has silenced Megatron's warnings before.
    from models.build import build_model

    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    threads = torch.get_num_threads()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        parallel = ParallelConfig()
        with session(parallel, seed):
            torch.set_num_threads(threads)
            network = build_model(model, parallel, precision, pre_process=True, post_process=True)
            network.eval()
            yield network
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def parameters(network: "LlavaNext") -> dict[str, Tensor]:
    """{name: detached parameter}, no copies."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def fuses_norms(network: "LlavaNext") -> bool:
    """True where Transformer Engine keeps a layer's norm inside the linear after it."""
    return any(name.endswith("layer_norm_weight") for name, _ in network.named_parameters())


def fill(network: "LlavaNext", tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of the same names, casting to their dtype."""
    own = parameters(network)
    differing = sorted(set(own) ^ set(tensors))
    assert not differing, f"models/hf_state.py and models/llava_next.py disagree on {differing[:5]}"
    for name, parameter in own.items():
        parameter.copy_(tensors[name])
