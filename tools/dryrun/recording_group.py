"""Process groups that write down every call and send nothing.

A call returns at once, as if the other members had given the same: gathers repeat this rank's own
part (so that Python objects can be gathered), reductions leave it as it is, receives leave the
buffer. Gloo groups that Megatron-core makes beside the others are recorded likewise.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tools.dryrun.report import Call, Group

if TYPE_CHECKING:  # its stub has overloads that torch never calls
    _Base = Any
else:
    _Base = dist.ProcessGroup

BACKEND = "dryrun"


@dataclass
class Recorder:
    """What one rank asked of its groups, in order."""

    phase: str = "groups"
    groups: list[Group] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


_recorder: Recorder | None = None


def _place() -> str:
    """The innermost caller in Megatron, and in this project."""
    names: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(names) < 2:
        name = frame.f_code.co_filename
        ours = any(f"/{room}/" in name for room in ("models", "pipeline")) and not any(
            word in name for word in ("site-packages", "cpu_backend")
        )
        inside = "/megatron/" in name and not names
        if inside or (ours and "megatron" not in name):
            short = name[name.index("megatron/") :] if inside else "/".join(name.split("/")[-2:])
            names.append(f"{short}:{frame.f_lineno} {frame.f_code.co_name}")
            if not inside:
                break
        if frame.f_back is None:
            break
        frame = frame.f_back
    return " < ".join(names) or "?"


class _Done(dist._Work):
    """A call that is over."""

    def __init__(self, result: list[Tensor]) -> None:
        super().__init__()
        future: Any = torch.futures.Future()
        future.set_result(result)
        self._future = future

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class RecordingGroup(_Base):
    """One member's view of a group."""

    def __init__(self, rank: int, ranks: Sequence[int], name: str) -> None:
        super().__init__(rank, len(ranks))
        self._size, self._ranks, self._name = len(ranks), tuple(ranks), name
        self._number: int | None = None

    def size(self) -> int:
        return self._size

    @property
    def group_name(self) -> str:
        return self._name

    def getBackendName(self) -> str:
        return BACKEND

    def note(self, op: str, tensor: Tensor | None, peer: int | None = None) -> None:
        """Write a call down; `peer` is a rank of this group."""
        assert _recorder is not None
        if self._number is None:
            _recorder.groups.append(Group(self.group_desc, self._ranks))
            self._number = len(_recorder.groups) - 1
        dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        shape = () if tensor is None else tuple(tensor.shape)
        source = None if peer is None else self._ranks[peer]
        _recorder.calls.append(
            Call(self._number, op, dtype, shape, source, _recorder.phase, _place())
        )

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        for tensor in tensors:
            self.note(f"all_reduce {_reduction(opts)}", tensor)
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        for tensor in tensors:
            self.note("broadcast", tensor, peer=0 if opts is None else opts.rootRank)
        return _Done(tensors)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:
        for tensor in tensors:
            self.note("reduce", tensor, peer=0 if opts is None else opts.rootRank)
        return _Done(tensors)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        for parts, own in zip(outputs, inputs, strict=True):
            self.note("all_gather", own)
            for part in parts:
                part.copy_(own)
        return _Done(inputs)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> _Done:
        self.note("all_gather", own)
        _same_count(output, own, self._size, "all-gather")
        output.view(self._size, -1).copy_(own.reshape(1, -1).expand(self._size, -1))
        return _Done([output])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own, opts)
        return _Done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Done:
        self.note("gather", inputs[0], peer=0 if opts is None else opts.rootRank)
        for part in outputs[0] if outputs else ():
            part.copy_(inputs[0])
        return _Done(inputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> _Done:
        self.note("scatter", outputs[0], peer=0 if opts is None else opts.rootRank)
        if inputs:
            outputs[0].copy_(inputs[0][self.rank()])
        return _Done(outputs)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> _Done:
        for own, parts in zip(outputs, inputs, strict=True):
            self.note("reduce_scatter", own)
            own.copy_(parts[self.rank()])
        return _Done(outputs)

    def reduce_scatter_single(self, own: Tensor, whole: Tensor, opts: Any = None) -> _Done:
        self.note("reduce_scatter", own)
        _same_count(whole, own, self._size, "reduce-scatter")
        own.copy_(whole.reshape(self._size, *own.shape)[self.rank()])
        return _Done([own])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        for own, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(own, whole, opts)
        return _Done(outputs)

    def alltoall_base(
        self, output: Tensor, own: Tensor, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> _Done:
        self.note("all_to_all", own)
        return _Done([output])

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> _Done:
        self.note("send", tensors[0], peer=peer)
        return _Done(tensors)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> _Done:
        self.note("recv", tensors[0], peer=peer)
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> _Done:
        self.note("barrier", None)
        return _Done([])

    # torch before 2.13 calls the same by other names
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _reduction(options: Any) -> str:
    reductions = ("SUM", "AVG", "MAX", "MIN", "PRODUCT")
    if options is None:
        return "sum"
    known = (name for name in reductions if options.reduceOp == getattr(dist.ReduceOp, name))
    return next(known, "?").lower()


def _same_count(whole: Tensor, part: Tensor, ranks: int, what: str) -> None:
    if whole.numel() != part.numel() * ranks:
        raise ValueError(
            f"{what} of {tuple(part.shape)} over {ranks} ranks does not fit {tuple(whole.shape)}"
        )


def _create(options: Any, backend_options: Any) -> RecordingGroup:
    ranks = options.global_ranks_in_group or range(options.group_size)  # none: all of them
    return RecordingGroup(options.group_rank, ranks, options.group_id)


if not hasattr(dist.Backend, BACKEND.upper()):
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])


@contextmanager
def recording(rank: int, world_size: int) -> Iterator[Recorder]:
    """Inside, `torch.distributed` is rank `rank` of `world_size`, and every group records."""
    global _recorder
    recorder = _recorder = Recorder()
    init, new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: Any = None, **unused: Any) -> None:
        init(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)

    def new_recording_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": BACKEND})

    replaced = {
        "init_process_group": init_process_group,
        "new_group": new_recording_group,
        "all_gather_object": _all_gather_object,
        "broadcast_object_list": _broadcast_object_list,
        "gather_object": _gather_object,
    }
    with ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch.object(dist, name, function))
        try:
            yield recorder
        finally:
            _recorder = None


# Python objects travel as tensors whose size depends on all members' objects, which are not there.


def _group(group: Any) -> RecordingGroup:
    chosen: Any = dist.group.WORLD if group is None else group
    assert isinstance(chosen, RecordingGroup)
    return chosen


def _all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    _group(group).note("all_gather_object", None)
    object_list[:] = [obj] * len(object_list)


def _broadcast_object_list(
    object_list: list[Any], src: int | None = None, group: Any = None, **unused: Any
) -> None:
    _group(group).note("broadcast_object_list", None)


def _gather_object(
    obj: Any,
    object_gather_list: list[Any] | None = None,
    dst: Any = None,
    group: Any = None,
    **unused: Any,
) -> None:
    _group(group).note("gather_object", None)
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)
