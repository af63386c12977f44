"""Shards are ordinary USTAR files that other readers open."""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest

from data_shards.writer import ShardWriter, tar_header
from tests.data_shards.conftest import World

SAMPLES = [
    ("000000000", [("json", b'{"a": 1}'), ("0.png", b"x" * 512)]),
    ("000000001", [("json", b""), ("0.jpg", b"y" * 513), ("1.jpg", b"z")]),
]


def write(path: Path) -> list:
    with ShardWriter(path) as writer:
        members = [writer.add(key, contents) for key, contents in SAMPLES]
        info = writer.close()
    return [info, *members]


def test_headers_are_those_of_tarfile() -> None:
    info = tarfile.TarInfo("000000001.0.jpg")
    info.size = 123_456
    expected = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    assert tar_header("000000001.0.jpg", 123_456) == bytes(expected)


@pytest.mark.parametrize(("name", "size"), [("n" * 101, 1), ("n", 8**11)])
def test_what_ustar_cannot_hold_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit USTAR"):
        tar_header(name, size)


def test_offsets_sizes_and_hashes(tmp_path: Path) -> None:
    info, *written = write(tmp_path / "s.tar")
    whole = (tmp_path / "s.tar").read_bytes()
    assert (info.size, info.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert info.samples == 2 and info.name == "s.tar"
    for (_, contents), members in zip(SAMPLES, written, strict=True):
        for (_, content), member in zip(contents, members, strict=True):
            assert whole[member.offset : member.offset + member.size] == content
            assert member.crc32 == zlib.crc32(content)
            assert member.sha256 == hashlib.sha256(content).digest()


def test_tarfile_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "s.tar")
    with tarfile.open(tmp_path / "s.tar") as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive}
    assert found == {f"{key}.{ext}": data for key, contents in SAMPLES for ext, data in contents}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("k", [("json", b"{}")])
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_webdataset_sees_the_same_bytes(world: World) -> None:
    import webdataset

    manifest = world.manifests["chats"]
    shards = [str(manifest.shards_directory / s.name) for s in manifest.info.shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == manifest.table["key"].to_pylist()
    from data_shards.reader import DescriptorCache, ShardReader

    reader = ShardReader(manifest, DescriptorCache())
    for row, sample in enumerate(samples):
        record, images = reader.read(row)
        assert sample["json"] == record and json.loads(record)["messages"]
        theirs = [data for name, data in sorted(sample.items()) if name[0].isdigit()]
        assert theirs == images
        for data in images:
            from PIL import Image

            Image.open(io.BytesIO(data)).load()
