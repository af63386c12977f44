"""Samples by manifest row: one `pread` each, every member's CRC-32 checked. Thread-safe."""

import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_shards.manifest import Manifest

_TRIES = 3  # a parallel file system may fail for a moment
_WAIT = 0.2  # seconds, doubled at each try
_GAP = 16 << 10  # bytes between two members that are cheaper to read than to pass over


class BadSample(ValueError):
    """The bytes of one sample are not what the manifest says; names shard, sample and cause."""


class DescriptorCache:
    """At most `limit` open files, least recently used closed first, never one in use."""

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, users]

    @contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        """An open descriptor of `path` for the length of the block."""
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0]
            self._open.move_to_end(path)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                self._shrink()

    def close(self) -> None:
        """Close what is not in use."""
        with self._lock:
            self._shrink(0)

    def __len__(self) -> int:
        return len(self._open)

    def _shrink(self, limit: int | None = None) -> None:
        limit = self._limit if limit is None else limit
        for path in [p for p, (_, users) in self._open.items() if not users]:
            if len(self._open) <= limit:
                return
            os.close(self._open.pop(path)[0])


class ShardReader:
    """Reads the samples of one data set."""

    def __init__(self, manifest: Manifest, descriptors: DescriptorCache):
        self._manifest = manifest
        self._descriptors = descriptors
        self._paths = [manifest.shards_directory / shard.name for shard in manifest.info.shards]

    def read(self, row: int) -> tuple[bytes, list[bytes]]:
        """(JSON member, image members) of one sample.

        Raises:
            BadSample: the file cannot be read there, or a member's CRC-32 differs.
        """
        manifest = self._manifest
        first, last = manifest.first_image[row], manifest.first_image[row + 1]
        spans = [manifest.json_span[row].tolist(), *manifest.image_span[first:last].tolist()]
        crcs = [int(manifest.json_crc32[row]), *manifest.image_crc32[first:last].tolist()]
        path = self._path(row, spans)
        members: list[bytes] = [b""] * len(spans)
        for numbers, start, stop in _together(spans):
            data = self._pread(path, start, stop - start, row)
            for number in numbers:
                offset, size = spans[number]
                members[number] = data[offset - start : offset - start + size]
        for number, (member, crc) in enumerate(zip(members, crcs, strict=True)):
            if zlib.crc32(member) != crc:
                what = "JSON" if number == 0 else f"image {number - 1}"
                raise BadSample(self._message(path, row, f"CRC-32 of its {what} differs"))
        return members[0], members[1:]

    def _path(self, row: int, spans: Sequence[Sequence[int]]) -> Path:
        """The shard of a sample; nothing that a damaged index says is followed."""
        shards, number = self._manifest.info.shards, int(self._manifest.shard[row])
        if not 0 <= number < len(shards):
            cause = f"the index names shard {number} of {len(shards)}"
            raise BadSample(self._message(self._manifest.path, row, cause))
        for offset, size in spans:
            if not (0 <= offset and 0 < size <= shards[number].size - offset):
                cause = f"the index says bytes {offset} to {offset + size}, outside the shard"
                raise BadSample(self._message(self._paths[number], row, cause))
        return self._paths[number]

    def _pread(self, path: Path, offset: int, size: int, row: int) -> bytes:
        wait = _WAIT
        for attempt in range(_TRIES):
            try:
                with self._descriptors.descriptor(path) as descriptor:
                    data = os.pread(descriptor, size, offset)
                    while len(data) < size:
                        more = os.pread(descriptor, size - len(data), offset + len(data))
                        if not more:
                            raise BadSample(self._message(path, row, "the shard ends before it"))
                        data += more
                    return data
            except OSError as error:
                if attempt == _TRIES - 1:
                    raise BadSample(
                        self._message(path, row, error.strerror or str(error))
                    ) from None
                time.sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")

    def _message(self, path: Path, row: int, cause: str) -> str:
        return (
            f"{path}: sample {self._manifest.key(row)} (row {row}): {cause}; "
            "restore the data set's files or build it again"
        )


def _together(spans: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], int, int]]:
    """Spans (offset, size) that one read serves: (their numbers, start, stop).

    Our own samples lie in one piece; in archives of others a sample's members may lie far apart,
    with other samples or gigabytes between them.
    """
    order = sorted(range(len(spans)), key=lambda number: spans[number][0])
    numbers: list[int] = []
    start = stop = 0
    for number in order:
        offset, size = spans[number]
        if numbers and offset > stop + _GAP:
            yield numbers, start, stop
            numbers = []
        if not numbers:
            start = stop = offset
        numbers.append(number)
        stop = max(stop, offset + size)
    yield numbers, start, stop
