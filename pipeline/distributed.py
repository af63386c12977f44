"""Device, backend and process groups of one rank.

The launcher, whichever it is, sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
nothing else about the machine is assumed. NCCL where there is a GPU, gloo where there is none.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from conf.schema.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout."""

    rank: int
    world_size: int
    device: torch.device
    data: int  # data-parallel rank
    data_size: int
    context: int
    context_size: int
    first_stage: bool  # holds the embedding, the vision tower and the connector
    last_stage: bool  # computes the loss
    reports: bool  # tensor, pipeline, context and data rank 0 of the first stage: writes files


def _environment(name: str) -> int:
    try:
        return int(os.environ[name])
    except KeyError:
        raise ConfigError(
            f"{name} is not set; start training through the launcher (make stage1) or torchrun"
        ) from None


def virtual_size(parallel: ParallelConfig) -> int | None:
    """Virtual pipeline stages as Megatron's `parallel_state` wants them: None for one."""
    return parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None


def seed_everything(seed: int) -> None:
    """Same weights and same dropout on every run with this seed."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


@contextmanager
def session(parallel: ParallelConfig, seed: int, timeout_minutes: int = 30) -> Iterator[Ranks]:
    """Join the job, build Megatron's groups for `parallel`, leave cleanly.

    Raises:
        ConfigError: the launcher started another number of ranks than the configuration says.
    """
    from megatron.core import parallel_state

    from models.cpu_backend import enable_cpu_backend

    rank, world_size = _environment("RANK"), _environment("WORLD_SIZE")
    if world_size != parallel.world_size:
        raise ConfigError(
            f"{world_size} ranks were started but parallel.world_size={parallel.world_size}; "
            "start as many ranks as the configuration says"
        )
    if torch.cuda.is_available():
        # Modulo: some sites show each rank its own GPU only, as the first.
        local = int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    enable_cpu_backend()
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            virtual_size(parallel),
            context_parallel_size=parallel.context,
        )
        seed_everything(seed)
        yield Ranks(
            rank=rank,
            world_size=world_size,
            device=device,
            data=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            context=parallel_state.get_context_parallel_rank(),
            context_size=parallel_state.get_context_parallel_world_size(),
            first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
            last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
            reports=rank == 0,
        )
        dist.barrier()  # not after an exception: it would wait for peers that may be gone
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
