"""Weights of either format under the same names, a bounded block of rows at a time.

A Hugging Face directory, or a stage (or one of its checkpoints) of a run: both answer by the
on-disk names of transformers 4.57.6 where they hold a LLaVA-NeXT, so that they can be compared.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from models.hf_state import FUSED_NORMS, Entry, on_disk_name, replace_suffix, table
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.handoff import DONE, read_done
from pipeline.manifest import MANIFEST
from tools.hf_export import model_of
from tools.safetensors_reader import SafetensorsDirectory

BLOCK_BYTES = 32 << 20


class WeightsView:
    """Names, shapes and rows of one set of weights. Use as a context manager."""

    def __init__(self, path: Path):
        self._opened = ExitStack()
        self._entries: dict[str, tuple[Entry, int]] = {}
        self._names: dict[str, str] = {}  # on disk in 4.57.6 -> in the files
        self._source: CheckpointTensors | SafetensorsDirectory
        stage = _stage_of(path)
        if stage is None:
            found = SafetensorsDirectory(path)
            self._source = self._opened.enter_context(found)
            for name in found.shapes():
                other = self._names.setdefault(on_disk_name(name), name)
                if other != name:
                    self._opened.close()
                    raise ValueError(
                        f"{path}: {name} and {other} are the same tensor; remove one of them"
                    )
            self._shapes = {new: found.shapes()[name] for new, name in self._names.items()}
            self.what = "Hugging Face"
            return
        done = read_done(stage)
        checkpoint = path if (path / MANIFEST).is_file() else stage / done.checkpoint
        self._source = self._opened.enter_context(CheckpointTensors(checkpoint))
        for entry in table(model_of(done, stage)):
            for number, name in enumerate(entry.hf):
                self._entries[name] = (entry, number)
        self._shapes = {
            name: entry.shapes[number] for name, (entry, number) in self._entries.items()
        }
        self.what = f"Megatron checkpoint {checkpoint.name}"

    def __enter__(self) -> "WeightsView":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return self._shapes

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor's rows in order, some at a time, in its own dtype."""
        shape = self._shapes[name]
        if isinstance(self._source, CheckpointTensors):
            yield from self._of_checkpoint(self._source, *self._entries[name])
            return
        theirs = self._names[name]
        for first, count in _steps(shape):
            yield self._source.read(theirs, first, count)

    def _of_checkpoint(
        self, source: CheckpointTensors, entry: Entry, number: int
    ) -> Iterator[Tensor]:
        name = replace_suffix(entry.megatron, FUSED_NORMS)
        name = name if source.has(name) else entry.megatron
        shape = entry.shapes[number]
        if entry.query_groups:
            part = entry.split(source.read(name))[number]
            for first, count in _steps(shape):
                yield part[first : first + count]
            return
        at = sum(rows[0] for rows in entry.shapes[:number])
        for first, count in _steps(shape):
            yield source.read(name, at + first, count)


def _steps(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first row, rows); the cuts depend on the shape alone, so that two views can be walked
    together."""
    row_numbers = max(torch.Size(shape[1:]).numel(), 1)
    step = max(BLOCK_BYTES // (4 * row_numbers), 1)
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def _stage_of(path: Path) -> Path | None:
    """The stage directory that `path` is, or whose checkpoint it is; None for other folders.

    Raises:
        ValueError: `path` is no directory.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; give an export, a stage or a checkpoint")
    if (path / DONE).is_file():
        return path
    if (path / MANIFEST).is_file():
        stage = path.resolve().parent.parent
        if not (stage / DONE).is_file():
            raise ValueError(
                f"{stage} has no {DONE}, which says what the model is; finish it first"
            )
        return stage
    return None
