"""A checkpoint of weights alone, written part by part without a network or a process group.

The files are those that Megatron-core's `dist_checkpointing.save` writes (torch_dist), made by
torch.distributed.checkpoint's own writer from tensors that exist only while they are written.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from data_shards.durable import sync_directory
from pipeline.checkpoint_files import Place, prune, step_directory
from pipeline.files import digest_and_fsync
from pipeline.manifest import Manifest, write_manifest

# What Megatron-core writes into metadata.json (dist_checkpointing/core.py, CheckpointingConfig).
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class LazyPart:
    """A piece of a tensor: where it lies, and how to get it when its turn comes."""

    name: str  # of the whole tensor in the checkpoint
    whole: tuple[int, ...]  # its shape
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class _Files(FileSystem):
    """Torch's files, keeping what went wrong: the writer forgets what its threads raise, and would
    finish a checkpoint without their parts."""

    def __init__(self, failures: list[BaseException]):
        super().__init__()
        self._failures = failures

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except BaseException as error:
            self._failures.append(error)


class _LazyPlanner(SavePlanner):
    """Plans all parts, asks for each when the writer comes to it."""

    def __init__(self, parts: Sequence[LazyPart], failures: list[BaseException]):
        self._failures = failures
        self._parts = {(part.name, part.start): part for part in parts}
        assert len(self._parts) == len(parts), "a part is there twice"

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Everything is known already."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(part.name, torch.Size(part.start)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(part.start), torch.Size(part.shape)),
                    properties=TensorProperties(dtype=part.dtype),
                    size=torch.Size(part.whole),
                ),
            )
            for part in self._parts.values()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # Megatron looks parts up by their offsets alone.
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        if self._failures:  # another thread's; the rest would be written for nothing
            raise self._failures[0]
        offset = write_item.index.offset
        assert offset is not None
        part = self._parts[write_item.index.fqn, tuple(offset)]
        tensor = part.read()
        assert tuple(tensor.shape) == part.shape and tensor.dtype == part.dtype, part.name
        return tensor


def write_checkpoint(
    parts: Sequence[LazyPart], stage_dir: Path, manifest: Manifest, workers: int
) -> Path:
    """Write `stage_dir`'s checkpoint of `manifest.step`; returns its folder.

    Each of `workers` threads holds one part. A kill leaves a dot-folder that the next call, or the
    next save, removes.

    Raises:
        OSError: no space, no permission. Whatever a part's `read` raises.
    """
    final = step_directory(stage_dir, manifest.step)
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    name = f".step_{manifest.step:08d}.{os.getpid()}-{time.time_ns()}.tmp"
    place = Place(stage_dir, manifest.step, final.parent / name)
    try:
        place.aside.mkdir()
        writer = dcp.FileSystemWriter(place.aside, thread_count=workers, sync_files=False)
        failures: list[BaseException] = []
        writer.fs = _Files(failures)
        # Widest first, so that the threads end together.
        ordered = sorted(parts, key=lambda part: -torch.Size(part.shape).numel())
        try:
            with warnings.catch_warnings():  # it warns that this is one process
                warnings.simplefilter("ignore", UserWarning)
                planner = _LazyPlanner(ordered, failures)
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.CheckpointException as error:  # of this thread, Ctrl-C among them
            failures += [wrapped[0] for wrapped in error.failures.values()] or [error]
        if failures:
            raise _cause(failures[0])
        (place.aside / "metadata.json").write_text(json.dumps(_FORMAT))
        torch.save({}, place.aside / "common.pt")
        files = {path.name: digest_and_fsync(path) for path in sorted(place.aside.iterdir())}
        write_manifest(place.aside, Manifest(**{**vars(manifest), "files": files}))
        sync_directory(place.aside)
        if final.exists():
            shutil.rmtree(final)
        place.aside.rename(final)
        sync_directory(final.parent)
        prune(stage_dir, keep=1)
    finally:
        shutil.rmtree(place.aside, ignore_errors=True)
    return final


def _cause(error: BaseException) -> BaseException:
    """What a part's `read` or the disk raised, behind what torch's archive made of it."""
    behind: BaseException | None = error
    while behind and not isinstance(behind, ValueError | OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or error
