"""Megatron-core on CPU: random states and the literals that name CUDA."""

import pytest
import torch

from conf.schema import ParallelConfig
from models.cpu_backend import enable_cpu_backend
from tests.distributed import megatron, run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is redirected here")


def literals_worker() -> None:
    enable_cpu_backend()
    enable_cpu_backend()  # the second time changes nothing
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.ones(1).cuda().device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64


def test_cuda_literals_mean_cpu() -> None:
    run_ranks(1, literals_worker)


def states_worker() -> None:
    from megatron.core import tensor_parallel

    def draw() -> float:
        return float(torch.rand(()))

    with megatron(ParallelConfig(2, tensor=2), seed=5):
        tracker = tensor_parallel.get_cuda_rng_tracker()
        torch.manual_seed(11)
        expected = [draw() for _ in range(3)]
        torch.manual_seed(11)
        found = [draw()]
        with tracker.fork():
            inside = [draw()]
        found.append(draw())
        with tracker.fork():
            inside.append(draw())
        found.append(draw())
        assert found == expected  # what is drawn inside leaves the outside alone
        assert inside[0] != inside[1]  # and goes on where it stopped
        saved = tracker.get_states()
        with tracker.fork():
            third = draw()
        tracker.set_states(saved)
        with tracker.fork():
            assert draw() == third
        with pytest.raises(ValueError, match="tracked already"):
            tracker.add("model-parallel-rng", 99)
        gathered: list = [None, None]
        torch.distributed.all_gather_object(gathered, inside)
        assert gathered[0] != gathered[1]  # each tensor-parallel rank has its own


def test_named_random_states() -> None:
    run_ranks(2, states_worker)
