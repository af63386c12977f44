"""The distributed optimizer's state in a checkpoint: boxes of flat pieces, and master weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import ParallelConfig, PrecisionConfig
from pipeline.checkpoint import _load_into, load, save, verify
from pipeline.manifest import CheckpointError
from pipeline.optimizer_state import boxes, merge_remainder, split_remainder
from tests.distributed import megatron, run_ranks
from tests.pipeline.tiny_state import largest_difference, one_step, tensors, tiny_state


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 2, 1, 5)])
def test_boxes_are_the_elements_in_order(shape: tuple[int, ...]) -> None:
    """Every [start, stop) of every shape, against NumPy's own indices."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size):
        for stop in range(start, numbers.size + 1):
            found = boxes(shape, start, stop)
            cut = [
                numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel()
                for box in found
            ]
            assert np.concatenate([[], *cut]).tolist() == list(range(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_master_weights_are_made_of_weight_and_remainder() -> None:
    """Bit for bit, zeros, halves and both signs; the weight is the master rounded to nearest."""
    master = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, -3e38])])
    half_way = torch.tensor([0x3F808000, 0x3F817FFF, -0x407F8000], dtype=torch.int32)
    master = torch.cat([master, half_way.view(torch.float32)])
    weight, remainder = split_remainder(master)
    assert weight.dtype == torch.bfloat16 and remainder.dtype == torch.int16
    assert torch.equal(
        merge_remainder(weight, remainder).view(torch.int32), master.view(torch.int32)
    )
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000  # Transformer Engine rounds these up
    assert torch.equal(weight[~tie], master.bfloat16()[~tie])


def _save_then_load(directory: str, params: str) -> list[float]:
    """On two replicas: largest difference after loading, right away and one step later."""
    parallel = ParallelConfig(2, distributed_optimizer=True)
    precision = PrecisionConfig(params=params)
    with megatron(parallel):
        before = tiny_state(parallel, precision, 2)
        held = tensors(before)
        place = save(before, Path(directory), keep=1)
        after = tiny_state(parallel, precision, 0)
        load(after, place, verify(place))
        differ = [largest_difference(tensors(after), held)]
        one_step(before)
        one_step(after)
        differ.append(largest_difference(tensors(after), tensors(before)))
        return differ


@pytest.mark.parametrize("params", ["fp32", "bf16"])
def test_a_resumed_optimizer_is_the_same(tmp_path: Path, params: str) -> None:
    assert run_ranks(2, _save_then_load, str(tmp_path), params) == [[0.0, 0.0]] * 2


def _save_as_megatron(directory: str) -> None:
    """With Megatron's own gathered format, on two replicas."""
    from megatron.core import dist_checkpointing, parallel_state

    parallel = ParallelConfig(2, distributed_optimizer=True)
    with megatron(parallel):
        state = tiny_state(parallel, PrecisionConfig(), 2)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = {"model": state.models[0].sharded_state_dict(metadata=metadata)}
        assert state.optimizer is not None and state.schedule is not None
        inner = state.optimizer.sharded_state_dict(model["model"], metadata=metadata)
        dist_checkpointing.save(
            {**model, "optimizer": inner, "schedule": state.schedule.state_dict()}, directory
        )
        dist.barrier()


def _read_both(megatron_dir: str, ours: str, parallel: ParallelConfig) -> float:
    """Largest difference between the two, each loaded under `parallel`."""
    with megatron(parallel):
        found = []
        for directory in (megatron_dir, ours):
            state = tiny_state(parallel, PrecisionConfig(), 0)
            _load_into(state, Path(directory), with_rng=False)
            found.append(tensors(state))
        assert any(float(t.abs().max()) > 0 for t in found[0] if t.numel())
        return largest_difference(*found)


def _refusal(directory: str) -> str:
    with megatron(ParallelConfig()):
        state = tiny_state(ParallelConfig(), PrecisionConfig(), 0)
        with pytest.raises(CheckpointError) as error:
            _load_into(state, Path(directory), with_rng=False)
        return str(error.value)


def test_reads_what_megatron_wrote_under_any_layout(tmp_path: Path) -> None:
    """Names and values are `fully_reshardable`'s, resharded to TP 2, PP 2 and one rank."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    run_ranks(2, _save_as_megatron, str(theirs))
    run_ranks(2, _save_then_load, str(tmp_path), "fp32")
    ours = tmp_path / "checkpoints" / "step_00000002"
    for parallel in (
        ParallelConfig(2, tensor=2, distributed_optimizer=True),
        ParallelConfig(2, pipeline=2, distributed_optimizer=True),
        ParallelConfig(1, distributed_optimizer=True),
    ):
        found = run_ranks(parallel.world_size, _read_both, str(theirs), str(ours), parallel)
        assert found == [0.0] * parallel.world_size
    assert "distributed_optimizer=true" in run_ranks(1, _refusal, str(ours))[0]
