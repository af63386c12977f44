"""The distributed optimizer's state as shards of global tensors, each rank its own part.

Megatron-core's layout-free format (`fully_reshardable`) first gathers the state of all replicas on
every rank: 12 bytes a parameter of host memory, times the ranks of a node, before a byte is
written. Here each rank hands over the flat piece of each parameter that it owns, cut into boxes
(at most 2*dimensions - 1 a piece), which torch's checkpoints put together again under any layout.
Names and values are those of `fully_reshardable`, so both read each other's checkpoints.

The master weight is always saved whole in FP32. Transformer Engine keeps only its lower 16 bits
beside a BF16 weight (`store_param_remainders`), which megatron-core 0.16.1 would save as numbers
and could not load.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from operator import add
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from models.cpu_backend import fill_adamw_state
from pipeline.manifest import CheckpointError

PREFIX = "optimizer.state"
SHARDS = "shards"
MOMENTS = ("exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The fewest boxes that the elements [start, stop) of a row-major tensor fall into, in order.

    >>> boxes((3, 4), 2, 9)
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        return [_in_row(first, box) for box in boxes(shape[1:], start % row, stop - first * row)]
    found: list[Box] = []
    if start % row:
        found += [_in_row(first, box) for box in boxes(shape[1:], start % row, row)]
        first += 1
    whole = stop // row - first
    if whole:
        found.append(((first, *(0 for _ in shape[1:])), (whole, *shape[1:])))
    if stop % row:
        found += [_in_row(last, box) for box in boxes(shape[1:], 0, stop % row)]
    return found


def _in_row(row: int, box: Box) -> Box:
    return (row, *box[0]), (1, *box[1])


def merge_remainder(weight: Tensor, remainder: Tensor) -> Tensor:
    """FP32 master weights from BF16 weights and their int16 remainders, bit for bit.

    Source: transformer_engine/common/multi_tensor/adam.cu (AdamFunctorMasterParamRemainder): the
    low half of the master's bits is the remainder, the high half the weight, which was rounded up
    where the remainder is negative.
    """
    high = weight.view(torch.int16).int() - (remainder < 0).int()
    return ((high << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def split_remainder(master: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 weights and int16 remainders of FP32 master weights: undoes `merge_remainder`."""
    bits = master.view(torch.int32)
    remainder = bits.to(torch.int16)  # the low half, as it wraps around
    high = (bits >> 16) + (remainder < 0).int()
    return high.to(torch.int16).view(torch.bfloat16), remainder


@dataclass(frozen=True)
class _Owned:
    """What this rank keeps of one parameter: the elements [start, stop) of the rank's tensor."""

    param: torch.nn.Parameter
    start: int
    stop: int
    state: dict[str, Tensor]  # exp_avg, exp_avg_sq and, where the optimizer holds it, master_param
    shard: Tensor  # of the master weights, or of the BF16 weights where state has the master


def _owned(optimizer: DistributedOptimizer) -> Iterator[_Owned]:
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for param, places in bucket["param_map"].items():
                    group, order = optimizer.model_param_group_index_map[param]
                    shard = optimizer.optimizer.param_groups[group]["params"][order]
                    part = places["param"]
                    state = optimizer.optimizer.state[shard]
                    yield _Owned(param, part.start, part.end, state, shard)


def _distributed(optimizer: MegatronOptimizer) -> DistributedOptimizer | None:
    """The distributed optimizer inside, if it is one and nothing else is chained to it."""
    if isinstance(optimizer, ChainedOptimizer):
        if len(optimizer.chained_optimizers) != 1:
            return None
        optimizer = optimizer.chained_optimizers[0]
    return optimizer if isinstance(optimizer, DistributedOptimizer) else None


def sharded_optimizer(
    optimizer: MegatronOptimizer, model: dict[str, Any], loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The optimizer's part of a checkpoint; `model` is the sharded state of all model chunks.

    For loading, the tensors are those of the optimizer itself wherever it holds them as they are
    saved, so that a checkpoint is read into place.
    """
    inner = _distributed(optimizer)
    if inner is None:
        state: dict[str, Any] = optimizer.sharded_state_dict(
            model, is_loading=loading, metadata=metadata
        )
        return state
    if inner.is_stub_optimizer:  # nothing on this rank is trained
        return {}
    if loading:
        _allocate(inner)
    names = {id(base.data): base for base in nested_values(model) if _is_sharded(base)}
    shards = {}
    for number, owned in enumerate(_owned(inner)):
        tensors = {"param": _master(owned, loading)}
        tensors.update((name, owned.state[name]) for name in MOMENTS)
        for name, flat in tensors.items():
            pieces = _pieces(names[id(owned.param)], f"{PREFIX}.{name}", flat, owned)
            shards.update({f"{number}.{name}.{i}": piece for i, piece in enumerate(pieces)})
    return {**inner.state_dict(), SHARDS: shards}


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded into the tensors of `sharded_optimizer(..., loading=True)`.

    Raises:
        CheckpointError: the checkpoint is a distributed optimizer's, and this one is not.
    """
    inner = _distributed(optimizer)
    if inner is None:
        if any("lr" not in group for group in loaded.get("param_groups", [])):
            raise CheckpointError(
                "the checkpoint was saved with parallel.distributed_optimizer=true, and without it "
                "its optimizer state does not load; set it again"
            )
        optimizer.load_state_dict(loaded)
        return
    if inner.is_stub_optimizer:
        return
    shards = loaded.pop(SHARDS)
    held = [(owned.shard, dict(owned.state)) for owned in _owned(inner)]
    inner.load_state_dict(loaded)
    for number, owned in enumerate(_owned(inner)):
        before, state = held[number]
        for name in ("param", *MOMENTS):
            flat = _joined(shards, f"{number}.{name}.")
            if name != "param":
                owned.state[name].copy_(flat)
            elif "master_param" not in state:
                owned.shard.data.copy_(flat)
            elif state["master_param"].dtype == torch.int16:
                weight, remainder = split_remainder(flat.float())
                owned.shard.data.copy_(weight)
                owned.state["master_param"].copy_(remainder)
            else:
                owned.state["master_param"].copy_(flat)
        assert before.shape == owned.shard.shape
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        inner.optimizer._sync_hdo_state_to_sub_optimizers()


def _joined(shards: dict[str, Tensor], prefix: str) -> Tensor:
    pieces: list[Tensor] = []
    while (name := f"{prefix}{len(pieces)}") in shards:
        pieces.append(shards[name].reshape(-1))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _allocate(optimizer: DistributedOptimizer) -> None:
    """Moments and master weights exist before they are read into."""
    if isinstance(optimizer.optimizer, torch.optim.AdamW):  # without Transformer Engine
        fill_adamw_state(optimizer.optimizer)
    optimizer.load_state_dict(optimizer.state_dict())


def _is_sharded(value: Any) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def _master(owned: _Owned, loading: bool) -> Tensor:
    """The master weights of the piece in FP32, flat."""
    master = owned.state.get("master_param")
    if master is None:
        return owned.shard.detach()
    if master.dtype != torch.int16:
        return master
    if loading:
        return torch.empty(owned.stop - owned.start, dtype=torch.float32)
    # To the host at once: on a GPU these would be bytes that the layout has not planned for.
    return merge_remainder(owned.shard.detach(), master).cpu()


def _pieces(
    base: ShardedTensor | ShardedTensorFactory, prefix: str, flat: Tensor, owned: _Owned
) -> Iterator[ShardedTensor]:
    """`flat`, the elements [start, stop) of the parameter, as boxes of its global tensor."""
    for part, begin in _parts(base, owned.param):
        size = prod(part.local_shape)
        start, stop = max(owned.start, begin), min(owned.stop, begin + size)
        done = start - owned.start
        for offset, shape in boxes(part.local_shape, start - begin, stop - begin):
            length = prod(shape)
            # The axes ahead (a layer's number) are made part of the box: torch takes it as it is.
            ahead = part.prepend_axis_num
            shape, offset = (
                (*(1 for _ in range(ahead)), *shape),
                (*(0 for _ in range(ahead)), *offset),
            )
            yield replace(
                part,
                key=f"{prefix}.{part.key}",
                data=flat[done : done + length].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_offset=tuple(map(add, part.global_offset, offset)),
                axis_fragmentations=None,  # no regular grid
                prepend_axis_num=0,
                replica_id=_without_replicas(part.replica_id),
            )
            done += length


def _parts(
    base: ShardedTensor | ShardedTensorFactory, param: torch.nn.Parameter
) -> Iterator[tuple[ShardedTensor, int]]:
    """The global tensors' parts that make up the parameter, and where in it each begins.

    A factory cuts the parameter up (SwiGLU's gate and up projections); where, its views tell.
    """
    if isinstance(base, ShardedTensor):
        yield base, 0
        return
    whole = torch.empty(param.shape, dtype=param.dtype, device="meta")
    built = base.build_fn(base.key, whole, base.replica_id, None)
    for part in nested_values(built):
        assert part.data.is_contiguous(), f"{base.key} is not cut along its first axis"
        yield part.without_data(), part.data.storage_offset()


def _without_replicas(replica: Any) -> tuple[int, ...]:
    """(pipeline, tensor, data) with data 0: over data-parallel ranks the pieces differ."""
    return (*replica[:2], 0)
