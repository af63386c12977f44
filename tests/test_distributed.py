"""The helper that runs functions on several ranks: results, failures, hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig
from tests.distributed import RankFailure, megatron, run_ranks


def add_ranks(offset: int) -> tuple[int, float]:
    with megatron(ParallelConfig(2)):
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return dist.get_rank(), float(total)


def fail_on_rank_one() -> None:
    with megatron(ParallelConfig(2)):
        if dist.get_rank() == 1:
            raise ValueError("rank one had enough")
        dist.all_reduce(torch.zeros(1))


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_results_come_in_rank_order_and_processes_serve_again() -> None:
    assert run_ranks(2, add_ranks, 1) == [(0, 3.0), (1, 3.0)]
    pids = run_ranks(2, os.getpid)
    assert run_ranks(2, add_ranks, 2) == [(0, 5.0), (1, 5.0)]
    assert run_ranks(2, os.getpid) == pids and len(set(pids)) == 2


def test_a_failure_shows_its_traceback_and_ends_the_others() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1\n(.|\n)*rank one had enough"):
        run_ranks(2, fail_on_rank_one)
    assert time.monotonic() - began < 60
    assert run_ranks(2, add_ranks, 0) == [(0, 1.0), (1, 1.0)]


def test_death_and_hang_are_told_apart() -> None:
    with pytest.raises(RankFailure, match="rank 1\nthe process died"):
        run_ranks(2, die_on_rank_one)
    with pytest.raises(RankFailure, match="no answer within 8 s"):
        run_ranks(1, sleep, 60.0, timeout=8)
