"""Tensors of a torch_dist checkpoint by name, from any layout, without Megatron or a process group.

Megatron-core writes each rank's part of a tensor as one `torch.save` archive inside a `.distcp`
file; `.metadata` says where each part lies in the file and in the whole tensor
(torch.distributed.checkpoint). Numbers are read straight from the archives' stored bytes into the
tensor asked for, so no more is held than that tensor and one part of it.
"""

import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline.manifest import CheckpointError
from pipeline.safe_pickle import read_metadata

_LAYERS = ".layers."
Region = tuple[tuple[int, int], ...]  # (start, length) along each dimension


@dataclass(frozen=True)
class _Part:
    """One rank's piece of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int  # of its archive in the file, bytes
    length: int


class CheckpointTensors:
    """Reads tensors of one checkpoint folder; use as a context manager. Thread-safe.

    Raises:
        CheckpointError: the folder's index cannot be trusted or read.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        metadata = read_metadata(directory)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._parts: dict[str, list[_Part]] = {name: [] for name in self._tensors}
        shapes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, entry in self._tensors.items()
            for chunk in entry.chunks
        }
        for index, place in metadata.storage_data.items():
            if index.fqn in self._tensors and index.offset is not None:
                start = tuple(index.offset)
                shape = shapes[index.fqn, start]
                part = _Part(start, shape, place.relative_path, place.offset, place.length)
                self._parts[index.fqn].append(part)
        self._data_at: dict[_Part, int] = {}  # found once a part
        self._files: dict[str, BinaryIO] = {}
        for name in {part.file for parts in self._parts.values() for part in parts}:
            if Path(name).name != name:
                raise CheckpointError(f"{directory / '.metadata'} names {name!r}, outside it")
            try:
                self._files[name] = open(directory / name, "rb", buffering=0)
            except OSError as error:
                raise CheckpointError(f"{directory / name}: {error.strerror}") from None

    def __enter__(self) -> "CheckpointTensors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by its name in the checkpoint."""
        return tuple(self._tensors[name].size)

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor by its name in the checkpoint."""
        dtype: torch.dtype = self._tensors[name].properties.dtype
        return dtype

    def names(self) -> list[str]:
        """Every tensor, by its name in the checkpoint."""
        return sorted(self._tensors)

    def has(self, name: str) -> bool:
        """Whether a parameter of the network is there."""
        try:
            self.find(name)
        except CheckpointError:
            return False
        return True

    def find(self, name: str) -> tuple[str, int | None]:
        """(name in the checkpoint, layer) of a parameter of the network.

        Megatron stacks the layers of a block: `decoder.layers.3.mlp...` is row 3 of
        `decoder.layers.mlp...`.

        Raises:
            CheckpointError: it is not there.
        """
        if name in self._tensors:
            return name, None
        block, found, rest = name.partition(_LAYERS)
        number, _, rest = rest.partition(".")
        stacked = f"{block}{_LAYERS}{rest}"
        if found and number.isdigit() and stacked in self._tensors:
            if int(number) < self._tensors[stacked].size[0]:
                return stacked, int(number)
        raise CheckpointError(
            f"{self._directory} holds no {name}; it is of another model, check its DONE.json"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter of the network."""
        stored, layer = self.find(name)
        size = tuple(self._tensors[stored].size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype in the checkpoint."""
        return self._tensors[self.find(name)[0]].properties.dtype

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows [first_row, first_row + rows) of a parameter, all by default; in its own dtype.

        Raises:
            CheckpointError: parts are missing, or are not what the index says.
        """
        stored, layer = self.find(name)
        shape = self.shape(name)
        rows = shape[0] - first_row if rows is None else rows
        if layer is None:
            return self.read_part(
                stored, (first_row, *([0] * (len(shape) - 1))), (rows, *shape[1:])
            )
        start = (layer, first_row, *([0] * (len(shape) - 1)))
        return self.read_part(stored, start, (1, rows, *shape[1:])).squeeze(0)

    def read_part(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The box of `shape` at `start` of a tensor by its name in the checkpoint.

        Raises:
            CheckpointError: as `read`.
        """
        out = torch.empty(shape, dtype=self._tensors[name].properties.dtype)
        wanted = tuple(zip(start, shape, strict=True))
        filled = sum(
            self._fill(out, wanted, part, f"{name} {list(part.start)}")
            for part in self._parts[name]
        )
        if filled != out.numel():
            raise CheckpointError(
                f"{self._directory} holds {filled} of the {out.numel()} numbers of {name}; it is "
                "incomplete, use another checkpoint"
            )
        return out

    def _fill(self, target: Tensor, wanted: Region, part: _Part, what: str) -> int:
        """Copy what `part` holds of the region into `target`; returns how many numbers."""
        common = []
        for (start, length), first, size in zip(wanted, part.start, part.shape, strict=True):
            low, high = max(start, first), min(start + length, first + size)
            if low >= high:
                return 0
            common.append((low, high))
        into = target[
            tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(common, wanted, strict=True))
        ]
        # Of the part, the rows that are needed of its first dimension longer than 1.
        axis = next((n for n, size in enumerate(part.shape) if size > 1), 0)
        row_numbers = math.prod(part.shape[axis + 1 :])
        low, high = (bound - part.start[axis] for bound in common[axis])
        held = torch.empty(0)
        if (data_at := self._data_at.get(part)) is None:
            data_at = self._data_at[part] = self._data_offset(part, target.dtype, what)
        shape = (*part.shape[:axis], high - low, *part.shape[axis + 1 :])
        direct = into.is_contiguous() and tuple(into.shape) == shape
        held = into if direct else torch.empty(shape, dtype=target.dtype)
        size = row_numbers * (high - low) * target.element_size()
        self._pread(part.file, held, size, data_at + low * row_numbers * target.element_size())
        if not direct:
            cut = [slice(a - f, b - f) for (a, b), f in zip(common, part.start, strict=True)]
            cut[axis] = slice(0, high - low)
            into.copy_(held[tuple(cut)])
        return into.numel()

    def _data_offset(self, part: _Part, dtype: torch.dtype, what: str) -> int:
        """Where in the file the numbers of a part begin.

        A `torch.save` archive is a ZIP whose entries are stored as they are; `data/0` is the
        tensor's storage. Its pickle says how the tensor lies in it.
        """
        slice_file = _Slice(self._files[part.file], part.offset, part.length)
        try:
            # On the meta device nothing but shape and strides is read.
            tensor: Any = torch.load(
                cast(BinaryIO, slice_file), map_location="meta", weights_only=True
            )
            slice_file.seek(0)
            with zipfile.ZipFile(slice_file) as archive:
                (entry,) = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
                slice_file.seek(entry.header_offset)
                header = slice_file.read(30)
        except Exception as error:  # ZIP and pickle readers raise almost anything
            raise CheckpointError(
                f"{self._directory / part.file}: {what} is damaged ({error}); "
                "use another checkpoint"
            ) from None
        size = math.prod(part.shape) * dtype.itemsize
        plain = (
            isinstance(tensor, Tensor)
            and tensor.dtype == dtype
            and tuple(tensor.shape) == part.shape
            and tensor.is_contiguous()
            and tensor.storage_offset() == 0
            and entry.compress_type == zipfile.ZIP_STORED
            and entry.file_size == size
        )
        if not plain:
            raise CheckpointError(
                f"{self._directory / part.file}: {what} is not the plain tensor that the index "
                "describes; use another checkpoint"
            )
        name, extra = (
            int.from_bytes(header[26:28], "little"),
            int.from_bytes(header[28:30], "little"),
        )
        return part.offset + entry.header_offset + 30 + name + extra

    def _pread(self, file: str, into: Tensor, size: int, offset: int) -> None:
        view = bytes_of(into)
        assert len(view) == size
        done = 0
        while done < size:
            count = os.preadv(self._files[file].fileno(), [view[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{self._directory / file} ends before byte {offset + size}")
            done += count


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read into or to write out."""
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


class _Slice:
    """A part of an open file as a file of its own; positions are its own, so threads may share."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._descriptor, self._start, self._length = file.fileno(), start, length
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size < 0 else min(size, left)
        data = os.pread(self._descriptor, size, self._start + self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
