"""Safetensors files written in any order and never held: the header first, then numbers by place.

The file's layout is the safetensors format's: eight bytes with the header's length, the header as
JSON, the tensors' bytes end to end. The same tensors give the same bytes as `safetensors.torch`.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint_tensors import bytes_of

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One file at `path`, of full size from the start; threads may write at once.

    Raises:
        OSError: no room, no permission.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]):
        self._path = path
        # As the library orders them: widest dtype first, then by name.
        ordered = sorted(tensors, key=lambda spec: (-spec.dtype.itemsize, spec.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        for spec in ordered:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.size],
            }
            self._places[spec.name] = (spec, at)
            at += spec.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data_at = 8 + len(text)
        self.size = self._data_at + at
        self._file = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        if at:
            os.posix_fallocate(self._file.fileno(), 0, self.size)

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Put `rows` (of the tensor's dtype and further dimensions) at its row `first_row`."""
        spec, at = self._places[name]
        assert rows.dtype == spec.dtype and tuple(rows.shape[1:]) == spec.shape[1:], name
        assert first_row + len(rows) <= spec.shape[0], name
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        view = bytes_of(rows.contiguous())
        offset = self._data_at + at + first_row * row_bytes
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without caring; the file is not whole."""
        self._file.close()
