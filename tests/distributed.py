"""Run a function on several gloo ranks from a test.

    def worker(scale: float) -> float:          # at module level, so that it can be imported
        with megatron(ParallelConfig(world_size=2, tensor=2)):
            return scale * dist.get_rank()

    assert run_ranks(2, worker, 10.0) == [0.0, 10.0]

The processes are started once (importing torch and Megatron takes seconds) and serve every test of
the session; one that failed or hung is replaced. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT are set anew for every call; destroying the process groups is the function's business,
`megatron` does it.
"""

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from conf.schema import ParallelConfig
from slurm.local import free_port


class RankFailure(AssertionError):
    """Some rank raised or did not answer; the message holds their tracebacks."""


class _Rank:
    """One worker process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon: Megatron's checkpoint writer starts children. It ends with its pipe.
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=1)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


_pool: list[_Rank] = []


def _serve(pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            environment, timeout, function, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        os.environ.update(environment)
        faulthandler.dump_traceback_later(timeout, file=sys.__stderr__ or 2)
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        _forget()
        try:
            pipe.send(answer)
        except (TypeError, AttributeError, ValueError) as error:
            pipe.send((False, f"the result cannot be sent to the test: {error}"))


def _forget() -> None:
    """Free what the function has built.

    A gloo group polls from threads of its own for as long as anything refers to it, and a network
    under Megatron's DDP refers to itself through autograd's nodes, where Python does not look; its
    rotary embedding is in a cache besides. Some hundred forgotten groups keep two cores busy.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()
    for item in gc.get_objects():
        if isinstance(item, DistributedDataParallel):
            item.grad_accs.clear()
    gc.collect()


@atexit.register
def stop_ranks() -> None:
    """End all worker processes; the next `run_ranks` starts new ones."""
    while _pool:
        _pool.pop().stop()


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    **kwargs: Any,
) -> list[Any]:
    """`function(*args, **kwargs)` on every rank; the results in rank order.

    Function, arguments and results travel by pickle, so the function must be importable. The
    first failure ends all ranks (the others would wait for it).

    Raises:
        RankFailure: a rank raised, died, or gave no answer within `timeout` seconds.
    """
    while len(_pool) < world_size:
        _pool.append(_Rank())
    ranks = _pool[:world_size]
    port = str(free_port())
    for number, rank in enumerate(ranks):
        environment = {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        rank.pipe.send((environment, max(timeout - 2, 1), function, args, kwargs))
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    grace: float | None = None  # after a failure, so that the other ranks can report theirs
    while len(answers) < world_size:
        until = deadline if grace is None else min(deadline, grace)
        open_pipes = {ranks[n].pipe: n for n in range(world_size) if n not in answers}
        ready = wait(list(open_pipes), timeout=max(until - time.monotonic(), 0))
        for item in ready:
            pipe = cast(Connection, item)
            number = open_pipes[pipe]
            try:
                answers[number] = pipe.recv()
            except (EOFError, OSError):
                answers[number] = (False, "the process died")
            if not answers[number][0] and grace is None:
                grace = time.monotonic() + 1
        if not ready and time.monotonic() >= until:
            break
    if len(answers) == world_size and all(good for good, _ in answers.values()):
        return [answers[number][1] for number in range(world_size)]
    stop_ranks()
    lines = [f"{getattr(function, '__name__', function)} failed on {world_size} ranks"]
    for number in range(world_size):
        good, text = answers.get(number, (False, f"no answer within {timeout:.0f} s"))
        if not good:
            lines.append(f"--- rank {number}\n{text}")
    raise RankFailure("\n".join(lines))


@contextlib.contextmanager
def megatron(parallel: ParallelConfig, seed: int = 1234) -> Iterator[None]:
    """Inside a rank: process groups and Megatron's parallel state for `parallel`."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from models.cpu_backend import enable_cpu_backend
    from pipeline.distributed import virtual_size

    enable_cpu_backend()
    dist.init_process_group("gloo")
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            virtual_size(parallel),
            context_parallel_size=parallel.context,
        )
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
        dist.barrier()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
