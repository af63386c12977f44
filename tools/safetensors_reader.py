"""Tensors of a Hugging Face directory by name and by rows, none held longer than asked for.

The safetensors library checks each file's header (bounds, overlaps, sizes) when it opens it; the
numbers are then read at the places that the header names. It would map whole files into memory,
which counts as the process's own.

Pickled weights (`pytorch_model.bin`) are refused: unpickling a file runs what is in it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint_tensors import bytes_of
from tools.safetensors_files import REMEDY, files_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int  # bytes in the file
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsDirectory:
    """One checkpoint directory. Thread-safe.

    Raises:
        ValueError: missing, damaged or pickled weights, naming file and remedy.
    """

    def __init__(self, directory: Path):
        self._places: dict[str, _Place] = {}
        self._descriptors: dict[Path, int] = {}
        promised, files = files_of(directory)
        for file in files:
            for name, place in _read_header(file).items():
                if name in self._places:
                    raise ValueError(
                        f"{file}: tensor {name} is in {self._places[name].file.name} as well; "
                        f"{REMEDY}"
                    )
                self._places[name] = place
        absent = sorted(set(promised) - set(self._places))
        if absent:
            raise ValueError(
                f"{directory}: the index promises tensor {absent[0]} ({len(absent)} in all), "
                f"which {promised[absent[0]]} does not hold; {REMEDY}"
            )
        try:
            for file in files:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> "SafetensorsDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return self._places[name].dtype

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Tensor:
        """Rows of one tensor (all by default), in its own dtype.

        Raises:
            ValueError: the file ends too early.
        """
        place = self._places[name]
        if not place.shape:
            out = torch.empty((), dtype=place.dtype)
            row_bytes, rows = place.dtype.itemsize, 1
        else:
            rows = place.shape[0] - first_row if rows is None else rows
            assert 0 <= first_row and first_row + rows <= place.shape[0], name
            out = torch.empty((rows, *place.shape[1:]), dtype=place.dtype)
            row_bytes = torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        view = bytes_of(out)
        offset = place.offset + first_row * row_bytes
        while view:
            count = os.preadv(self._descriptors[place.file], [view], offset)
            if not count:
                raise ValueError(f"{place.file} ends within tensor {name}; {REMEDY}")
            view, offset = view[count:], offset + count
        return out


def _read_header(path: Path) -> dict[str, _Place]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has dtype {entry['dtype']}; only plain floating point "
                "checkpoints can be imported, give one that is not quantised"
            )
        begin = int(entry["data_offsets"][0])
        shape = tuple(int(size) for size in entry["shape"])
        places[name] = _Place(path, 8 + length + begin, shape, _DTYPES[entry["dtype"]])
    return places
