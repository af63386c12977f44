"""One shard against its manifest, byte for byte.

Tar headers, padding and contents are all determined by the manifest, so a shard without a
complaint is the one that was built.
"""

import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.images import decode
from data_shards.manifest import Manifest, ManifestError
from data_shards.sample import count_images, record_messages
from data_shards.writer import BLOCK, tar_header

EXTENSIONS = ("jpg", "png")
END = 2 * BLOCK  # zeros that end an archive
_TRIES, _WAIT = 3, 0.2  # a parallel file system may fail for a moment; seconds, doubled


@dataclass(frozen=True)
class BadSample:
    """One sample that cannot be trained on as it was built."""

    key: str
    row: int  # of the manifest
    shard: str
    cause: str


@dataclass
class ShardReport:
    """What was found in one shard."""

    name: str
    samples: int = 0
    images: int = 0
    bytes: int = 0
    causes: list[str] = field(default_factory=list)  # of the shard as a whole
    bad: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class _Member:
    what: str  # for messages: "JSON", "image 0"
    names: tuple[str, ...]  # that its tar header may carry
    offset: int
    size: int
    crc32: int
    sha256: bytes


class Samples:
    """Where each sample of a data set lies, with the digests that the loader does not need."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        try:
            table = pq.read_table(manifest.path, columns=["json_sha256", "images"])
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{manifest.path} cannot be read ({error})") from None
        images = table["images"].combine_chunks()
        images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
        self._json_sha256 = table["json_sha256"]
        self._image_sha256 = images.flatten().field("sha256")

    def rows(self, shard: int) -> np.ndarray:
        """Manifest rows of a shard in the order of their bytes, int64."""
        rows = np.flatnonzero(self.manifest.shard == shard)
        return rows[np.argsort(self.manifest.json_span[rows, 0], kind="stable")]

    def images(self, row: int) -> range:
        first, last = self.manifest.first_image[row : row + 2]
        return range(int(first), int(last))

    def members(self, row: int) -> Iterator[_Member]:
        """The record, then the images."""
        m, key = self.manifest, self.manifest.key(row)
        offset, size = map(int, m.json_span[row])
        digest = self._json_sha256[row].as_py()
        yield _Member("JSON", (f"{key}.json",), offset, size, int(m.json_crc32[row]), digest)
        for number, image in enumerate(self.images(row)):
            offset, size = map(int, m.image_span[image])
            names = tuple(f"{key}.{number}.{extension}" for extension in EXTENSIONS)
            crc32, digest = int(m.image_crc32[image]), self._image_sha256[image].as_py()
            yield _Member(f"image {number}", names, offset, size, crc32, digest)


def check_shard(samples: Samples, number: int, max_pixels: int) -> ShardReport:
    """Read shard `number` and compare it with the manifest. What is wrong is in the report."""
    manifest = samples.manifest
    shard = manifest.info.shards[number]
    report = ShardReport(shard.name)
    rows = samples.rows(number).tolist()
    report.samples = len(rows)
    report.images = sum(len(samples.images(row)) for row in rows)
    path = manifest.shards_directory / shard.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        cause = f"it cannot be opened ({error.strerror})"
        report.causes.append(cause)
        report.bad = [BadSample(manifest.key(row), row, shard.name, cause) for row in rows]
        return report
    try:
        report.bytes = os.fstat(descriptor).st_size
        if report.bytes != shard.size:
            report.causes.append(f"it has {report.bytes} bytes, its manifest says {shard.size}")
        end = 0  # of what is explained until here
        for row in rows:
            causes = []
            for member in samples.members(row):
                start = member.offset - BLOCK
                if start != end:
                    report.causes.append(
                        f"bytes {min(start, end)} to {max(start, end)} are no sample's"
                    )
                end = member.offset + member.size + -member.size % BLOCK
                causes += _check_member(descriptor, member, samples, row, max_pixels)
            if causes:
                cause = "; ".join(causes)
                report.bad.append(BadSample(manifest.key(row), row, shard.name, cause))
        if report.bytes != end + END or _read(descriptor, end, END) != bytes(END):
            report.causes.append(
                f"after its last sample (byte {end}) it does not end as an archive"
            )
    finally:
        os.close(descriptor)
    print(f"{shard.name}: {report.samples} samples, {len(report.bad)} bad", flush=True)
    return report


def _check_member(
    descriptor: int, member: _Member, samples: Samples, row: int, max_pixels: int
) -> list[str]:
    """What is wrong with one member; empty when nothing is."""
    size = BLOCK + member.size + -member.size % BLOCK
    data = _read(descriptor, member.offset - BLOCK, size)
    if isinstance(data, str):
        return [f"its {member.what}: {data}"]
    header, content, padding = (
        data[:BLOCK],
        data[BLOCK:][: member.size],
        data[BLOCK + member.size :],
    )
    causes = []
    if header not in [tar_header(name, member.size) for name in member.names]:
        causes.append(f"the tar header of its {member.what} differs")
    if any(padding):
        causes.append(f"the padding after its {member.what} is not empty")
    if zlib.crc32(content) != member.crc32:
        return [*causes, f"CRC-32 of its {member.what} differs"]
    if sha256(content).digest() != member.sha256:
        return [*causes, f"SHA-256 of its {member.what} differs"]
    try:
        if member.what == "JSON":
            _check_record(content, samples, row)
        else:
            _check_image(content, samples, row, int(member.what.split()[1]), max_pixels)
    except ValueError as error:
        causes.append(f"its {member.what}: {' '.join(str(error).split())}")
    return causes


def _check_record(content: bytes, samples: Samples, row: int) -> None:
    """ValueError unless the record is what the loader expects."""
    messages, chosen, rejected = record_messages(json.loads(content))
    marks, images = count_images(messages), len(samples.images(row))
    if marks != images:
        raise ValueError(f"{marks} image placeholders but {images} images")
    is_pair = isinstance(chosen, str) and isinstance(rejected, str)
    if is_pair != samples.manifest.info.preference:
        raise ValueError("a pair among samples" if is_pair else "no chosen and rejected answers")


def _check_image(content: bytes, samples: Samples, row: int, number: int, max_pixels: int) -> None:
    """ValueError unless the image decodes to the size that the manifest says."""
    image = decode(content, max_pixels)
    height, width = samples.manifest.image_hw[samples.images(row)[number]].tolist()
    if (image.height, image.width) != (height, width):
        raise ValueError(f"{image.width}x{image.height} px, its manifest says {width}x{height} px")


def _read(descriptor: int, offset: int, size: int) -> bytes | str:
    """`size` bytes at `offset`, or why not."""
    wait, attempt, data = _WAIT, 1, bytearray()
    while len(data) < size:
        try:
            chunk = os.pread(descriptor, size - len(data), offset + len(data))
        except OSError as error:
            if attempt == _TRIES:
                return error.strerror or str(error)
            time.sleep(wait)
            wait, attempt = wait * 2, attempt + 1
            continue
        if not chunk:
            return "the shard ends before its end"
        data += chunk
    return bytes(data)
