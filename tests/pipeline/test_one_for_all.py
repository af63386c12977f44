"""One rank works, the others wait in short collectives; what goes wrong is everybody's."""

import time

import pytest
import torch.distributed as dist

from conf.schema import ParallelConfig
from pipeline.one_for_all import one_for_all
from tests.distributed import megatron, run_ranks


def _work(fails: bool) -> tuple[str, float]:
    with megatron(ParallelConfig(world_size=2)):
        rank = dist.get_rank()

        def work() -> str:
            time.sleep(0.4)
            if fails:
                raise ValueError(f"no shards for rank {rank}")
            return f"done by {rank}"

        began = time.monotonic()
        try:
            return one_for_all(work, seconds=0.1), time.monotonic() - began
        except ValueError as error:
            return f"ValueError: {error}", time.monotonic() - began


def test_all_ranks_get_the_result_or_the_error() -> None:
    results = run_ranks(2, _work, False)
    assert [text for text, _ in results] == ["done by 0", "done by 0"]
    assert min(seconds for _, seconds in results) >= 0.4, "the other one waited"
    texts = [text for text, _ in run_ranks(2, _work, True)]
    assert texts == [
        "ValueError: no shards for rank 0",
        "ValueError: rank 0: no shards for rank 0",
    ]


def test_alone_it_is_a_call() -> None:
    assert one_for_all(lambda: "here") == "here"
    with pytest.raises(OSError, match="full"):
        one_for_all(lambda: (_ for _ in ()).throw(OSError("full")))
