"""One shard against its manifest.

Of a shard that we wrote every byte is determined by the manifest: tar headers, contents, padding,
end. So a shard without a complaint is the one that was built. Of an archive of others (indexed in
place) the members that we read are determined, and its headers must be whole and say the same of
them; what else it holds, and how it is filled up, is not ours to judge.
"""

import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from data_shards.images import decode
from data_shards.manifest import Manifest
from data_shards.records import RecordEncoder, read
from data_shards.shard_rows import ShardRows, StoredMember
from data_shards.tar_index import TarError, TarMember, scan
from data_shards.writer import BLOCK, tar_header

END = 2 * BLOCK  # zeros that end an archive
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
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
class Checks:
    """What is asked of a shard's samples.

    Attributes:
        max_pixels: of an image.
        encoder: to count tokens anew; None leaves that to the loader.
    """

    max_pixels: int
    encoder: RecordEncoder | None = None


def check_shard(manifest: Manifest, number: int, checks: Checks) -> ShardReport:
    """Read shard `number` and compare it with the manifest. What is wrong is in the report.

    Raises:
        ManifestError: the manifest cannot be read.
    """
    shard = manifest.info.shards[number]
    report = ShardReport(shard.name)
    rows = ShardRows(manifest, number)
    report.causes += rows.differences()
    report.samples = len(rows)
    report.images = sum(rows.n_images(row) for row in rows)
    path = manifest.shards_directory / shard.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        report.bytes = os.fstat(descriptor).st_size
    except OSError as error:
        cause = f"it cannot be opened ({error.strerror})"
        report.causes.append(cause)
        report.bad = [BadSample(rows.key(row), row, shard.name, cause) for row in rows]
        return report
    try:
        if report.bytes != shard.size:
            report.causes.append(f"it has {report.bytes} bytes, its manifest says {shard.size}")
        if manifest.info.layout is None:
            _check_ours(descriptor, rows, checks, report)
        else:
            _check_theirs(path, descriptor, rows, checks, report)
    finally:
        os.close(descriptor)
    print(f"{shard.name}: {report.samples} samples, {len(report.bad)} bad", flush=True)
    return report


def _check_ours(descriptor: int, rows: ShardRows, checks: Checks, report: ShardReport) -> None:
    digest, end = sha256(), 0  # of what is explained until here
    for row in rows:
        causes: list[str] = []
        for member in rows.members(row):
            start = member.offset - BLOCK
            if start != end:
                report.causes.append(
                    f"bytes {min(start, end)} to {max(start, end)} are no sample's"
                )
            end = member.offset + member.size + -member.size % BLOCK
            data = _read(descriptor, start, end - start)
            if isinstance(data, str):
                causes.append(f"its {member.what}: {data}")
                continue
            digest.update(data)
            content = data[BLOCK:][: member.size]
            if data[:BLOCK] not in _headers(rows.key(row), member, content):
                causes.append(f"the tar header of its {member.what} differs")
            if any(data[BLOCK + member.size :]):
                causes.append(f"the padding after its {member.what} is not empty")
            causes += _check_content(content, member, rows, row, checks)
        _note(causes, rows, row, report)
    tail = _read(descriptor, end, END)
    if report.bytes != end + END or tail != bytes(END):
        report.causes.append(f"after its last sample (byte {end}) it does not end as an archive")
    elif not report.causes and not report.bad:
        digest.update(tail)
        if digest.hexdigest() != rows.manifest.info.shards[rows.number].sha256:
            report.causes.append("its SHA-256 is not the one that its manifest says")


def _check_theirs(
    path: Path, descriptor: int, rows: ShardRows, checks: Checks, report: ShardReport
) -> None:
    found: dict[int, TarMember] = {}
    explained: float = 0  # byte up to which the archive's headers are known
    try:
        for entry in scan(path):
            found[entry.offset] = entry
            explained = entry.offset + entry.size
        explained = float("inf")
    except TarError as error:
        report.causes.append(str(error))
    for row in rows:
        causes: list[str] = []
        for member in rows.members(row):
            here = found.get(member.offset)
            if here is None and member.offset < explained:
                causes.append(f"the archive has no member where its {member.what} was")
            elif here is not None and (here.size != member.size or here.problem is not None):
                causes.append(f"the tar header of its {member.what} differs")
            content = _read(descriptor, member.offset, member.size)
            if isinstance(content, str):
                causes.append(f"its {member.what}: {content}")
            else:
                causes += _check_content(content, member, rows, row, checks)
        _note(causes, rows, row, report)


def _note(causes: list[str], rows: ShardRows, row: int, report: ShardReport) -> None:
    if causes:
        report.bad.append(BadSample(rows.key(row), row, report.name, "; ".join(causes)))


def _headers(key: str, member: StoredMember, content: bytes) -> Iterator[bytes]:
    """The tar headers that the builder could have written before this content."""
    if member.image is None:
        extensions = ["json"]
    else:
        known = {"png": content.startswith(_PNG), "jpg": content.startswith(_JPEG)}
        # Content that is neither is damaged, which its digest tells.
        extensions = [
            f"{member.image}.{extension}"
            for extension, is_it in known.items()
            if is_it or not any(known.values())
        ]
    return (tar_header(f"{key}.{extension}", member.size) for extension in extensions)


def _check_content(
    content: bytes, member: StoredMember, rows: ShardRows, row: int, checks: Checks
) -> list[str]:
    """What is wrong with one member's bytes; empty when nothing is."""
    if zlib.crc32(content) != member.crc32:
        return [f"CRC-32 of its {member.what} differs"]
    if sha256(content).digest() != member.sha256:
        return [f"SHA-256 of its {member.what} differs"]
    try:
        if member.image is not None:
            _check_image(content, member, checks.max_pixels)
        elif checks.encoder is not None:
            checks.encoder.encode(row, content)
        else:
            read(rows.manifest, row, content)
    except (ValueError, RecursionError) as error:
        return [f"its {member.what}: {' '.join(str(error).split())}"]
    return []


def _check_image(content: bytes, member: StoredMember, max_pixels: int) -> None:
    """ValueError unless the image decodes to the size that the manifest says."""
    image, said = decode(content, max_pixels), f"{member.width}x{member.height} px"
    if image.size != (member.width, member.height):
        raise ValueError(f"{image.width}x{image.height} px, its manifest says {said}")


def _read(descriptor: int, offset: int, size: int) -> bytes | str:
    """`size` bytes at `offset`, or why not."""
    wait, attempt, data = _WAIT, 1, b""
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
    return data
