"""Safetensors files written in any order and never held: the header first, then numbers by place.

The file's layout is the safetensors format's: eight bytes with the header's length, the header as
JSON, the tensors' bytes end to end. The same tensors give the same bytes as `safetensors.torch`.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint_tensors import bytes_of

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CHUNK = 1 << 22  # bytes hashed at a time


class Abandoned(Exception):
    """The file will not become whole."""


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
        self._file = open(path, "w+b")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()
        if at:
            os.posix_fallocate(self._file.fileno(), 0, self.size)
        self._changed = threading.Condition()
        self._whole_to = self._data_at  # everything before is written
        self._islands: dict[int, int] = {}  # first byte -> byte behind, past `_whole_to`
        self._abandoned = False

    def place(self, name: str) -> int:
        """Where a tensor begins, in bytes behind the header."""
        return self._places[name][1]

    def write(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        """Put `rows` (of the tensor's dtype and further dimensions) at its row `first_row`.

        Each row of each tensor is written once.
        """
        spec, at = self._places[name]
        assert rows.dtype == spec.dtype and tuple(rows.shape[1:]) == spec.shape[1:], name
        assert first_row + len(rows) <= spec.shape[0], name
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        view = bytes_of(rows.contiguous())
        begin = offset = self._data_at + at + first_row * row_bytes
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count
        if offset > begin:
            with self._changed:
                self._islands[begin] = offset
                while self._whole_to in self._islands:
                    self._whole_to = self._islands.pop(self._whole_to)
                self._changed.notify_all()

    def finish(self) -> str:
        """SHA-256 of the file, computed behind the writers; then flushes it to disk, and closes.

        Returns once every row has been written, by other threads. The file stays open when it
        fails itself, for those may still be writing.

        Raises:
            Abandoned: `abandon` was called.
            OSError: the file cannot be read or flushed, or another process cut it.
        """
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_CHUNK))
        while at < self.size:
            ready = self._ready(at)
            while at < ready:
                count = os.preadv(self._file.fileno(), [buffer[: ready - at]], at)
                if not count:
                    raise OSError(f"{self._file.name} was cut short while it was written")
                digest.update(buffer[:count])
                at += count
        os.fsync(self._file.fileno())
        self._file.close()
        return digest.hexdigest()

    def _ready(self, at: int) -> int:
        """How far the file is whole, once that is past `at`."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or self._whole_to > at)
            if self._abandoned:
                self._file.close()
                raise Abandoned
            return self._whole_to

    def abandon(self) -> None:
        """Give up, when no thread writes any more; the file is not whole."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
