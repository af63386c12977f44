"""Every kind of damage to a shard is found and named, and nothing is found where there is none."""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_shards.manifest import Manifest, read_manifest, rows_to_table, write_manifest
from data_shards.shard_check import Checks
from data_shards.validate import main, shard_range, validate
from data_shards.writer import BLOCK, ShardWriter, tar_header
from tests.data_shards import toys
from tests.data_shards.conftest import World

MAX_PIXELS = 1_000_000


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Manifest:
    """A copy of `chats`, to be damaged: three shards at least."""
    source = world.manifests["chats"].path.parent
    shutil.copytree(source, tmp_path / "shards" / "chats")
    return read_manifest(tmp_path / "shards" / "chats" / "manifest.parquet")


def check(manifest: Manifest, first: int = 0, last: int | None = None) -> dict[str, Any]:
    return validate(manifest, first, last, Checks(MAX_PIXELS), workers=2)


def shard_path(manifest: Manifest, number: int) -> Path:
    return manifest.shards_directory / manifest.info.shards[number].name


def change(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = path.read_bytes()
    change(path, offset, bytes([data[offset] ^ 1 << bit]))


def the_bad(report: dict[str, Any]) -> list[tuple[str, str]]:
    assert report["bad_samples"] == len(report["bad"])
    return [(entry["key"], entry["cause"]) for entry in report["bad"]]


def test_whole_shards_have_no_complaint(world: World) -> None:
    for name, manifest in world.manifests.items():
        report = check(manifest)
        assert report["bad_samples"] == 0 and report["bad_shards"] == [] and report["bad"] == []
        assert report["samples"] == len(manifest)
        assert report["images"] == len(manifest.image_tiles), name
        assert report["bytes"] == sum(shard.size for shard in manifest.info.shards)


def test_every_bit_of_a_sample_counts(copy: Manifest) -> None:
    """Header, record, image and padding of one sample of the second shard, one at a time."""
    row = next(r for r in range(len(copy)) if copy.shard[r] == 1 and copy.first_image[r + 1])
    while copy.first_image[row] == copy.first_image[row + 1]:
        row += 1
    path, key = shard_path(copy, 1), copy.key(row)
    json_at, json_size = map(int, copy.json_span[row])
    image_at, image_size = map(int, copy.image_span[copy.first_image[row]])
    assert json_size % BLOCK
    for offset, cause in (
        (json_at - BLOCK + 3, "the tar header of its JSON differs"),
        (json_at + json_size // 2, "CRC-32 of its JSON differs"),
        (json_at + json_size, "the padding after its JSON is not empty"),
        (image_at - 10, "the tar header of its image 0 differs"),
        (image_at, "CRC-32 of its image 0 differs"),
        (image_at + image_size - 1, "CRC-32 of its image 0 differs"),
    ):
        flip(path, offset, bit=offset % 8)
        report = check(copy)
        assert the_bad(report) == [(key, cause)]
        assert report["bad"][0]["shard"] == path.name and report["bad"][0]["row"] == row
        flip(path, offset, bit=offset % 8)
    assert check(copy)["bad_samples"] == 0


def test_forged_header_is_found_though_its_checksum_is_right(copy: Manifest) -> None:
    at, size = map(int, copy.json_span[0])
    change(shard_path(copy, 0), at - BLOCK, tar_header("another.json", size))
    assert the_bad(check(copy)) == [(copy.key(0), "the tar header of its JSON differs")]


def test_content_forged_under_the_same_crc_is_found(copy: Manifest) -> None:
    """CRC-32 is linear: any change can be made good by four other bytes."""
    path = shard_path(copy, 0)
    at, size = map(int, copy.json_span[0])
    honest = path.read_bytes()[at : at + size]
    forged = _same_crc(honest, b"Z" + honest[1:])
    assert forged != honest and zlib.crc32(forged) == zlib.crc32(honest)
    change(path, at, forged)
    assert the_bad(check(copy)) == [(copy.key(0), "SHA-256 of its JSON differs")]


def _same_crc(honest: bytes, forged: bytes) -> bytes:
    """`forged` with its last four bytes chosen so that its CRC-32 is that of `honest`."""
    start = len(forged) - 4
    basis: dict[int, tuple[int, int]] = {}  # highest bit -> (effect on the CRC, bits to flip)
    for bit in range(32):
        flipped = bytearray(forged)
        flipped[start + bit // 8] ^= 1 << bit % 8
        effect, bits = zlib.crc32(flipped) ^ zlib.crc32(forged), 1 << bit
        while effect and effect.bit_length() in basis:
            other = basis[effect.bit_length()]
            effect, bits = effect ^ other[0], bits ^ other[1]
        basis[effect.bit_length()] = (effect, bits)
    left, chosen = zlib.crc32(honest) ^ zlib.crc32(forged), 0
    while left:
        effect, bits = basis[left.bit_length()]
        left, chosen = left ^ effect, chosen ^ bits
    last = int.from_bytes(forged[start:], "little") ^ chosen
    return forged[:start] + last.to_bytes(4, "little")


@pytest.mark.parametrize("cut", [1, 2 * BLOCK, 9_000])
def test_truncated_shard(copy: Manifest, cut: int) -> None:
    path = shard_path(copy, 0)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - cut])
    report = check(copy)
    causes = [entry["cause"] for entry in report["bad_shards"]]
    assert f"it has {size - cut} bytes, its manifest says {size}" in causes
    assert any("does not end as an archive" in cause for cause in causes)
    assert {entry["shard"] for entry in report["bad_shards"]} == {path.name}
    lost = {
        copy.key(row)
        for row in range(len(copy))
        if copy.shard[row] == 0
        and max(
            [int(copy.json_span[row].sum())]
            + [
                int(copy.image_span[image].sum())
                for image in range(copy.first_image[row], copy.first_image[row + 1])
            ]
        )
        > size - cut
    }
    assert {key for key, _ in the_bad(report)} == lost
    assert bool(lost) == (cut == 9_000)
    assert all("the shard ends before its end" in cause for _, cause in the_bad(report))


def test_bytes_that_belong_to_nobody(copy: Manifest) -> None:
    first, second = shard_path(copy, 0), shard_path(copy, 1)
    first.write_bytes(first.read_bytes() + b"\0" * BLOCK)
    flip(second, second.stat().st_size - 5)
    report = check(copy)
    assert report["bad_samples"] == 0
    assert {entry["shard"] for entry in report["bad_shards"]} == {first.name, second.name}


def test_missing_and_unlisted_shards(copy: Manifest) -> None:
    gone, stray = shard_path(copy, 1), shard_path(copy, 0).with_name("chats-99999-0000.tar")
    gone.unlink()
    stray.write_bytes(b"")
    report = check(copy)
    expected = sum(1 for row in range(len(copy)) if copy.shard[row] == 1)
    assert report["bad_samples"] == expected > 0
    assert {entry["shard"] for entry in report["bad_shards"]} == {gone.name, stray.name}
    assert check(copy, 0, 0)["bad_shards"] == []
    assert [entry["shard"] for entry in check(copy, 1, 1)["bad_shards"]] == [gone.name]
    assert [entry["shard"] for entry in check(copy, 2)["bad_shards"]] == [stray.name]


def test_whole_bytes_that_cannot_be_trained_on(copy: Manifest, tmp_path: Path) -> None:
    """Digests that are right do not make an image readable or a record one."""
    rows = pq.read_table(copy.path).to_pylist()[:4]
    image = toys.encoded(toys.picture(1, 40, 90))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    record = {"messages": [question, {"role": "assistant", "content": "sim"}]}
    good = json.dumps(record).encode()
    contents = [
        (good, b"not an image"),
        (good, toys.encoded(toys.picture(1, 41, 90))),
        (b'{"messages": 3}', image),
        (json.dumps({"messages": record["messages"][1:]}).encode(), image),
    ]
    folder = tmp_path / "forged"
    (folder / "shards").mkdir(parents=True)
    with ShardWriter(folder / "shards" / "forged-00000-0000.tar") as writer:
        for row, (text, data) in zip(rows, contents, strict=True):
            members = [
                dataclasses.asdict(m)
                for m in writer.add(row["key"], [("json", text), ("0.png", data)])
            ]
            row.update({f"json_{name}": value for name, value in members[0].items()}, shard=0)
            row["images"] = [{**members[1], "width": 90, "height": 40, "tiles": 1}]
            row["tiles"] = 1
        info = dataclasses.replace(copy.info, shards=(writer.close(),))
    write_manifest(folder / "manifest.parquet", rows_to_table(rows), info)
    causes = [cause for _, cause in the_bad(check(read_manifest(folder / "manifest.parquet")))]
    assert len(causes) == 4
    assert causes[0].startswith("its image 0: not a readable image")
    assert causes[1] == "its image 0: 90x41 px, its manifest says 90x40 px"
    assert causes[2].startswith("its JSON: not a sample record")
    assert causes[3] == "its JSON: 0 image placeholders but 1 images"


def test_command(
    copy: Manifest, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "reports" / "one.json"
    root, tokenizer = copy.path.parent.parent, world.data.tokenizer
    words = [f"data.root={root}", f"data.tokenizer={tokenizer}", f"report={report}"]
    words += ["+data.sources={chats: {input: none}}", "source=chats"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("all good")
    assert json.loads(report.read_text())["manifest_digest"] == copy.info.digest
    flip(shard_path(copy, 2), int(copy.json_span[copy.shard == 2][0, 0]))
    assert main([*words, "shards=0..1"]) == 0
    assert main([*words, "shards=2..2"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "CRC-32 of its JSON differs" in out[-2]
    assert out[-1].endswith("DAMAGED: 1 samples, 0 shards")
    assert json.loads(report.read_text())["bad_samples"] == 1
    for wrong in ("shards=3..1", "shards=x", "source=nothing"):
        assert main([*words, wrong]) == 2
    copy.path.write_bytes(b"")
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_shard_range() -> None:
    assert shard_range("3..8") == (3, 8)
    assert shard_range("3..") == (3, None)
    assert shard_range("3") == (3, 3)
