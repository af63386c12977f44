"""The index of a manifest: flat columns as .npy files that every rank maps into memory.

    NAME/index/index.json     the facts, and of each column its type, shape and SHA-256
    NAME/index/tokens.npy ... one file a column (`COLUMNS`)

Opening reads index.json and sixteen short headers, however many samples there are; a page of a
column is read when one of its values is asked for, and shared by all processes of a node.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from data_shards.durable import replacing, sync_directory
from data_shards.manifest_facts import string_bytes

DIRECTORY = "index"
INDEX_FILE = "index.json"
CHUNK = 1 << 20  # rows, or images, looked at together

# Column -> (dtype, values of one row of it). n samples, m images.
COLUMNS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "shard": ("<i4", 1),  # [n]
        "json_span": ("<i8", 2),  # [n, 2]: offset, size in bytes
        "json_crc32": ("<u4", 1),  # [n]
        "first_image": ("<i8", 1),  # [n + 1]: images of sample i are first_image[i:i+2]
        "image_span": ("<i8", 2),  # [m, 2]: offset, size in bytes
        "image_crc32": ("<u4", 1),  # [m]
        "image_hw": ("<i4", 2),  # [m, 2]: height, width in pixels
        "image_tiles": ("<i4", 1),  # [m]
        "tokens": ("<i4", 1),  # [n]
        "tokens_rejected": ("<i4", 1),  # [n], 0 unless a pair
        "target_tokens": ("<i4", 1),  # [n], both answers of a pair
        "tiles": ("<i4", 1),  # [n]
        "first_key_byte": ("<i8", 1),  # [n + 1]: the key of sample i is key_bytes[these two]
        "key_bytes": ("|u1", 1),  # UTF-8
    }
)
_HEADER = 128  # bytes of a column's .npy header, padded


class DamagedIndex(ValueError):
    """An index that is not whole; names the file and the cause."""


class ColumnFile:
    """A .npy file that grows, for columns that do not fit in memory."""

    def __init__(self, path: Path, dtype: str, width: int = 1):
        self._file: BinaryIO = open(path, "wb")
        self._file.write(bytes(_HEADER))
        self._dtype, self._width, self._values = np.dtype(dtype), width, 0
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        """Add rows, [k] or [k, width]."""
        data = np.ascontiguousarray(values, self._dtype)
        if data.size:
            self._file.write(data.data)
            self._digest.update(data.data)
        self._values += data.size

    def close(self) -> dict[str, Any]:
        """Flush to disk; returns dtype, shape and SHA-256 of the values."""
        rows = self._values // self._width
        shape = [rows] if self._width == 1 else [rows, self._width]
        self._file.seek(0)
        self._file.write(_header(self._dtype.str, shape))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"dtype": self._dtype.str, "shape": shape, "sha256": self._digest.hexdigest()}

    def discard(self) -> None:
        """Close without finishing."""
        self._file.close()


def map_column(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """A column's values, mapped into memory, read-only.

    Raises:
        DamagedIndex: it is missing, or its header or its size is another.
    """
    count = int(np.prod(shape, dtype=np.int64))
    try:
        with open(path, "rb") as file:
            header, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
            if header != _header(dtype, shape):
                raise DamagedIndex(f"{path} does not hold {dtype}{shape}, so it was changed")
            expected = _HEADER + count * np.dtype(dtype).itemsize
            if size != expected:
                raise DamagedIndex(f"{path} has {size} bytes instead of {expected}")
            if not count:
                return np.empty(shape, dtype)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, dtype, count, _HEADER).reshape(shape)
    except OSError as error:
        raise DamagedIndex(f"{path} cannot be read ({error.strerror})") from None


def release(columns: Iterable[np.ndarray]) -> None:
    """Let go of the memory of mapped columns; they are read again where they are asked for."""
    for column in columns:
        base: Any = column
        while isinstance(base, np.ndarray):
            base = base.base
        mapped = base.obj if isinstance(base, memoryview) else base
        if isinstance(mapped, mmap.mmap):
            mapped.madvise(mmap.MADV_DONTNEED)


def column_digest(path: Path) -> str:
    """SHA-256 of a column's values."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(_HEADER)
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """JSON with its own digest, atomically."""
    with replacing(path) as file:
        file.write(json.dumps({**content, "sha256": _seal(content)}, sort_keys=True).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        DamagedIndex: it cannot be read, is no such file or was changed.
    """
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("sha256")
    except OSError as error:
        raise DamagedIndex(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndex(f"{path} is damaged ({' '.join(str(error).split())})") from None
    if seal != _seal(content):
        raise DamagedIndex(f"{path} does not match its own digest, so it was changed")
    return dict(content)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _header(dtype: str, shape: list[int]) -> bytes:
    """The .npy header (format 1.0) of a C-ordered array, always 128 bytes long."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": tuple(shape)})
    content = text.encode().ljust(_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


class IndexWriter:
    """Writes the columns of rows that come in parts."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self._folder = folder
        self._files = {
            name: ColumnFile(folder / f"{name}.npy", *kind) for name, kind in COLUMNS.items()
        }
        self._totals = {"first_image": 0, "first_key_byte": 0}
        for name in self._totals:
            self._files[name].append(np.zeros(1, np.int64))

    def add(self, rows: pa.Table) -> None:
        """Add rows of the manifest's schema without nulls."""
        for batch in rows.to_batches():
            for name, values in batch_columns(batch).items():
                if name in self._totals:  # given as lengths
                    ends = np.cumsum(values, dtype=np.int64) + self._totals[name]
                    self._totals[name] = int(ends[-1]) if len(ends) else self._totals[name]
                    values = ends
                self._files[name].append(values)

    def close(self) -> dict[str, dict[str, Any]]:
        """Column -> dtype, shape, SHA-256."""
        found = {name: file.close() for name, file in self._files.items()}
        sync_directory(self._folder)
        return found

    def discard(self) -> None:
        """Close all files without finishing."""
        for file in self._files.values():
            file.discard()


def batch_columns(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Index columns of some rows; `first_image` and `first_key_byte` as lengths."""

    def numbers(name: str) -> np.ndarray:
        return batch.column(name).to_numpy(zero_copy_only=False)

    images, keys = batch.column("images"), batch.column("key")
    flat = images.flatten()
    ends, key_bytes = string_bytes(keys)

    def of_images(name: str) -> np.ndarray:
        return flat.field(name).to_numpy(zero_copy_only=False)

    return {
        "shard": numbers("shard"),
        "json_span": np.stack([numbers("json_offset"), numbers("json_size")], axis=1),
        "json_crc32": numbers("json_crc32"),
        "first_image": np.asarray(images.value_lengths()).astype(np.int64),
        "image_span": np.stack([of_images("offset"), of_images("size")], axis=1),
        "image_crc32": of_images("crc32"),
        "image_hw": np.stack([of_images("height"), of_images("width")], axis=1),
        "image_tiles": of_images("tiles"),
        "tokens": numbers("tokens"),
        "tokens_rejected": numbers("tokens_rejected"),
        "target_tokens": numbers("target_tokens") + numbers("target_tokens_rejected"),
        "tiles": numbers("tiles"),
        "first_key_byte": np.diff(ends).astype(np.int64),
        "key_bytes": key_bytes,
    }


def check_rows(
    columns: Mapping[str, np.ndarray], sizes: np.ndarray, preference: bool
) -> Iterator[tuple[int, str]]:
    """(row, what is wrong with it): a manifest written wrong, not one that was damaged.

    Args:
        sizes: int64, bytes of each shard.
    """
    for first in range(0, len(columns["tokens"]), CHUNK):
        rows = slice(first, first + CHUNK)
        shard, span = columns["shard"][rows], columns["json_span"][rows]
        bounds = columns["first_image"][first : first + len(shard) + 1]
        inside = (shard >= 0) & (shard < len(sizes))
        yield from _bad(first, inside, "names a shard that the manifest does not list")
        before = columns["shard"][max(first - 1, 0) : first + len(shard) - 1]
        order = shard[len(shard) - len(before) :] >= before
        order = np.concatenate([np.ones(len(shard) - len(order), bool), order])
        yield from _bad(first, order, "stands behind a row of a later shard")
        forward = np.diff(bounds) >= 0
        yield from _bad(first, forward, "has images that end before they begin")
        if not (inside.all() and forward.all()):
            return
        limit = sizes[shard]
        yield from _bad(first, _within(span, limit), "has a JSON member outside its shard")
        owner = np.repeat(np.arange(len(shard)), np.diff(bounds))
        images = slice(int(bounds[0]), int(bounds[-1]))
        tiles = columns["image_tiles"][images]
        good = _within(columns["image_span"][images], limit[owner])
        good &= (columns["image_hw"][images] > 0).all(axis=1) & (tiles > 0)
        fine = np.bincount(owner[~good], minlength=len(shard)) == 0
        yield from _bad(first, fine, "has an image outside its shard")
        sums = np.bincount(owner, tiles, minlength=len(shard))
        yield from _bad(first, sums == columns["tiles"][rows], "has another sum of tiles")
        pair = columns["tokens_rejected"][rows] > 0
        yield from _bad(first, pair == preference, "is a pair among samples, or the reverse")
        trains = (columns["tokens"][rows] > 0) & (columns["target_tokens"][rows] > 0)
        yield from _bad(first, trains, "has no token to train on")
        release(columns.values())


def _within(span: np.ndarray, limit: np.ndarray) -> np.ndarray:
    # size <= limit - offset: a sum could overflow
    return (span[:, 0] >= 0) & (span[:, 1] > 0) & (span[:, 1] <= limit - span[:, 0])


def _bad(first: int, good: np.ndarray, cause: str) -> Iterator[tuple[int, str]]:
    for row in np.flatnonzero(~good)[:1]:
        yield first + int(row), cause


def key_of(columns: Mapping[str, np.ndarray], row: int) -> str:
    """The key of one sample."""
    begin, end = columns["first_key_byte"][row : row + 2]
    return bytes(columns["key_bytes"][begin:end]).decode("utf-8", "replace")


def map_columns(folder: Path, described: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """All columns of an index by name, mapped into memory.

    Raises:
        DamagedIndex: naming the file and the cause.
    """
    found = {
        name: map_column(folder / f"{name}.npy", dtype, list(described[name]["shape"]))
        for name, (dtype, _) in COLUMNS.items()
    }
    samples, images = len(found["tokens"]), len(found["image_tiles"])
    last = {"first_image": images, "first_key_byte": len(found["key_bytes"])}
    for name, values in found.items():
        if name in last:
            whole = len(values) == samples + 1 and values[0] == 0 and values[-1] == last[name]
        else:
            whole = name == "key_bytes" or len(values) == (
                images if name.startswith("image_") else samples
            )
        if not whole:
            raise DamagedIndex(f"{folder / name}.npy does not go with the other columns")
    return found
