"""pread by index: damage is found, descriptors are bounded."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_shards import reader as reader_module
from data_shards.manifest import Manifest, read_manifest
from data_shards.reader import BadSample, DescriptorCache, ShardReader
from tests.data_shards.conftest import World


def copied(world: World, name: str, root: Path) -> Manifest:
    """A copy of one data set under `root`, to be damaged."""
    shutil.copytree(world.manifests[name].path.parent, root / name)
    return read_manifest(root / name / "manifest.parquet")


@pytest.fixture
def manifest(world: World, tmp_path: Path) -> Manifest:
    return copied(world, "chats", tmp_path)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def shard_of(manifest: Manifest, row: int) -> Path:
    return manifest.shards_directory / manifest.info.shards[manifest.shard[row]].name


@pytest.mark.parametrize("what", ["JSON", "image 0", "image 1"])
def test_one_flipped_bit(manifest: Manifest, what: str) -> None:
    row = 3
    first = manifest.first_image[row]
    spans = [manifest.json_span[row], manifest.image_span[first], manifest.image_span[first + 1]]
    offset, size = spans[["JSON", "image 0", "image 1"].index(what)]
    flip(shard_of(manifest, row), int(offset + size // 2))
    reader = ShardReader(manifest, DescriptorCache())
    message = rf"{shard_of(manifest, row).name}: sample 000000003 \(row 3\): CRC-32 of its {what}"
    with pytest.raises(BadSample, match=message):
        reader.read(row)
    for other in range(len(manifest)):
        if other != row:
            reader.read(other)


def test_a_zeroed_header_loses_nothing(manifest: Manifest) -> None:
    """webdataset and tarfile would silently stop there."""
    row = 5
    header = int(manifest.json_span[row, 0]) - 512
    path = shard_of(manifest, row)
    data = bytearray(path.read_bytes())
    data[header : header + 512] = bytes(512)
    path.write_bytes(bytes(data))
    reader = ShardReader(manifest, DescriptorCache())
    for other in range(len(manifest)):
        reader.read(other)


def test_a_truncated_shard_loses_its_tail_only(manifest: Manifest) -> None:
    path = shard_of(manifest, 0)
    mine = [row for row in range(len(manifest)) if shard_of(manifest, row) == path]
    os.truncate(path, int(manifest.json_span[mine[-1], 0]) + 3)
    reader = ShardReader(manifest, DescriptorCache())
    for row in mine[:-1]:
        reader.read(row)
    with pytest.raises(BadSample, match="the shard ends before it"):
        reader.read(mine[-1])


def test_members_that_lie_apart_are_read_one_by_one(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [ShardReader(manifest, DescriptorCache()).read(row) for row in range(len(manifest))]
    reads: list[int] = []
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(reader_module, "_GAP", -1)
    monkeypatch.setattr(reader_module.os, "pread", counted)
    apart = [ShardReader(manifest, DescriptorCache()).read(row) for row in range(len(manifest))]
    assert apart == whole
    assert sorted(reads) == sorted(
        [*manifest.json_span[:, 1].tolist(), *manifest.image_span[:, 1].tolist()]
    )


def test_a_file_that_cannot_be_read(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_WAIT", 0.0)
    shard_of(manifest, 0).unlink()
    with pytest.raises(BadSample, match="No such file"):
        ShardReader(manifest, DescriptorCache()).read(0)


def test_a_passing_failure_is_tried_again(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_WAIT", 0.0)
    fails = iter([True, True, False])
    real = os.pread

    def flaky(descriptor: int, size: int, offset: int) -> bytes:
        if next(fails, False):
            raise OSError(5, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(reader_module.os, "pread", flaky)
    expected = ShardReader(manifest, DescriptorCache()).read(0)
    assert expected == ShardReader(manifest, DescriptorCache()).read(0)


def test_descriptors_are_bounded_and_threads_agree(manifest: Manifest) -> None:
    assert len(manifest.info.shards) >= 4
    alone = [ShardReader(manifest, DescriptorCache()).read(row) for row in range(len(manifest))]
    before = len(os.listdir("/proc/self/fd"))
    cache = DescriptorCache(2)
    shared = ShardReader(manifest, cache)
    rows = list(range(len(manifest))) * 20
    with ThreadPoolExecutor(6) as pool:
        for row, found in zip(rows, pool.map(shared.read, rows), strict=True):
            assert found == alone[row]
    assert len(cache) <= 2
    cache.close()
    # Fewer when files of other tests were collected meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= before
