"""Hugging Face tensors as the parts of a Megatron checkpoint, read when each is written.

The names are those under which Megatron-core 0.16 to 0.19 saves the network: the layers of a block
stacked in one tensor, norms under the names of Transformer Engine's fused layers, whatever layers
will load them.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from models.hf_state import FUSED_NORMS, VOCABULARY_TABLES, Match, mean_row, replace_suffix
from pipeline.checkpoint_writer import LazyPart
from tools.safetensors_reader import SafetensorsDirectory

BLOCK_BYTES = 64 << 20  # of a large tensor's rows in one part
_LAYER = re.compile(r"(.*(?:encoder|decoder)\.layers)\.(\d+)\.(.*)")


def checkpoint_name(parameter: str) -> tuple[str, int | None]:
    """(name in a checkpoint, layer or None) of a parameter of `LlavaNext`."""
    name = replace_suffix(parameter, FUSED_NORMS)
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, None
    return f"{found[1]}.{found[3]}", int(found[2])


def lazy_parts(
    source: SafetensorsDirectory,
    matches: Iterable[Match],
    dtype: torch.dtype,
    layers: dict[str, int],
) -> Iterator[LazyPart]:
    """Parts of the checkpoint for every match.

    Args:
        layers: layers of each stacked block, such as {"language_model.decoder.layers": 42}.
    """
    for match in matches:
        entry = match.entry
        name, layer = checkpoint_name(entry.megatron)
        whole: tuple[int, ...] = entry.shape
        lead: tuple[int, ...] = ()
        if layer is not None:
            block = name[: name.index(".layers") + len(".layers")]
            whole, lead = (layers[block], *entry.shape), (layer,)
        if entry.query_groups:
            yield _part(name, whole, lead, 0, entry.shape, dtype, _joiner(source, match))
            continue
        at = 0
        for theirs, ours, shape in zip(match.theirs, entry.hf, entry.shapes, strict=True):
            rows = _Rows(source, theirs, ours in VOCABULARY_TABLES)
            row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
            step = max(BLOCK_BYTES // row_bytes, 1)
            for first in range(0, shape[0], step):
                count = min(step, shape[0] - first)
                yield _part(
                    name,
                    whole,
                    lead,
                    at + first,
                    (count, *shape[1:]),
                    dtype,
                    lambda rows=rows, first=first, count=count: rows.read(first, count),
                )
            at += shape[0]


def ready_part(parameter: str, tensor: Tensor, dtype: torch.dtype) -> LazyPart:
    """A tensor that is in memory already, such as the fresh connector's."""
    name, layer = checkpoint_name(parameter)
    assert layer is None
    shape = tuple(tensor.shape)
    return _part(name, shape, (), 0, shape, dtype, lambda: tensor)


def _part(
    name: str,
    whole: tuple[int, ...],
    lead: tuple[int, ...],
    first: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    read: object,
) -> LazyPart:
    assert callable(read)
    stacked = (1,) * len(lead) + shape
    start = (*lead, first, *([0] * (len(shape) - 1)))
    return LazyPart(
        name, whole, start, stacked, dtype, lambda: read().to(dtype).reshape(stacked).contiguous()
    )


def _joiner(source: SafetensorsDirectory, match: Match) -> object:
    return lambda: match.entry.join([source.read(name) for name in match.theirs])


class _Rows:
    """Rows of one tensor of the source, grown by its mean row where it has too few."""

    def __init__(self, source: SafetensorsDirectory, name: str, grows: bool):
        self._source, self._name = source, name
        self._there = source.shapes()[name][0] if grows else None
        self._mean = cache(self._mean_row)  # read once, by whichever part comes first

    def read(self, first: int, count: int) -> Tensor:
        """Rows [first, first + count)."""
        if self._there is None or first + count <= self._there:
            return self._source.read(self._name, first, count)
        have = max(self._there - first, 0)
        rows = [self._source.read(self._name, first, have)] if have else []
        new = self._mean().to(self._source.dtype(self._name)).expand(count - have, -1)
        return torch.cat([*rows, new])

    def _mean_row(self) -> Tensor:
        assert self._there is not None
        width = self._source.shapes()[self._name][1]
        step = max(BLOCK_BYTES // (8 * width), 1)
        return mean_row(
            self._source.read(self._name, first, min(step, self._there - first))
            for first in range(0, self._there, step)
        )
