"""Archives written by webdataset, indexed where they lie: the same samples as when rewritten."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from conf.schema.data import SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from data_shards.foreign_records import read_record
from data_shards.manifest import Manifest, ManifestError, read_manifest
from data_shards.reader import BadSample, DescriptorCache, ShardReader
from data_shards.sample import SampleError
from data_shards.sources import SourceError
from data_shards.validate import Checks, is_damaged, validate
from tests.data_shards import toys

Sample = Mapping[str, Any]
Build = Callable[..., Manifest]


def write_archives(
    folder: Path, shards: Sequence[Sequence[Sample]], key: str = "{key:04d}"
) -> Path:
    """Archives as webdataset writes them, with keys that come back in each; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        with wds.TarWriter(str(folder / f"s-{number:03d}.tar")) as writer:
            for place, sample in enumerate(samples):
                writer.write({"__key__": key.format(shard=number, key=place), **sample})
    return folder / "*.tar"


def chats(count: int, first: int = 0) -> list[Sample]:
    """Toy chats with the images beside the record, several of them numbered."""
    found = []
    for row in toys.chat_rows(count, first):
        sample: dict[str, Any] = {"json": {"messages": row["messages"], "licence": "CC0-1.0"}}
        for number, data in enumerate(row["images"]):
            extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
            name = extension if len(row["images"]) == 1 else f"{number}.{extension}"
            sample[name] = data
        found.append(sample)
    return found


@pytest.fixture
def build(tmp_path: Path, tokenizer_directory: Path, tokenizer: ChatTokenizer) -> Build:
    def run(pattern: Path, name: str = "theirs", in_place: bool = True, **options: Any) -> Manifest:
        source = SourceConfig(str(pattern), format="webdataset", in_place=in_place, **options)
        source.check(name)
        data = toys.data_config(tmp_path / "built", tokenizer_directory, **{name: source})
        return build_dataset(name, source, data, toys.GEOMETRY, tokenizer.digest())

    return run


def reasons(manifest: Manifest) -> list[str]:
    path = manifest.path.parent / "quarantine" / "reasons.jsonl"
    return [json.loads(line)["reason"] for line in path.read_text().splitlines()]


def test_indexes_without_writing_and_reads_the_same(tmp_path: Path, build: Build) -> None:
    pattern = write_archives(tmp_path / "theirs", [chats(7), chats(6, 50)])
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pattern.parent.iterdir()
    }
    manifest, rewritten = build(pattern), build(pattern, "ours", in_place=False)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in pattern.parent.iterdir()} == before
    assert not list(manifest.path.parent.rglob("*-00000-*.tar"))
    assert manifest.shards_directory == pattern.parent.resolve()
    assert [(shard.name, shard.samples) for shard in manifest.info.shards] == [
        ("s-000.tar", 7),
        ("s-001.tar", 6),
    ]
    assert len(manifest) == len(rewritten) == 13
    for column in ("tokens", "target_tokens", "tiles", "first_image", "image_hw", "image_tiles"):
        assert np.array_equal(getattr(manifest, column), getattr(rewritten, column)), column
    assert manifest.table["licence"].to_pylist() == ["CC0-1.0"] * 13

    theirs = list(wds.WebDataset(sorted(map(str, before)), shardshuffle=False))
    reader = ShardReader(manifest, DescriptorCache())
    for row, (sample, key) in enumerate(
        zip(theirs, manifest.table["key"].to_pylist(), strict=True)
    ):
        record, images = reader.read(row)
        assert record == sample["json"] and key == f"{row:09d}"
        named = {k: v for k, v in sample.items() if not k.startswith("__") and k != "json"}
        assert images == [named[name] for name in sorted(named)]
        assert manifest.info.layout is not None
        messages, *_ = read_record(record, manifest.info.layout, key, len(images))
        again, _ = ShardReader(rewritten, DescriptorCache()).read(row)
        assert messages == json.loads(again)["messages"]


def test_captions_beside_the_image(tmp_path: Path, build: Build) -> None:
    picture = toys.encoded(toys.picture(1, 40, 60), "JPEG")
    samples = [
        {"jpg": picture, "txt": "Um cão na praia."},
        {"jpg": picture, "json": {"caption": "Um gato.", "license": "CC-BY-4.0"}},
        {"jpg": picture, "json": {"url": "x"}, "txt": "Um carro à chuva."},
        {"jpg": picture, "txt": '{"not": "a caption"}'},
        {"jpg": picture, "txt": b"\xff\xfe"},
    ]
    pattern = write_archives(tmp_path / "theirs", [samples])
    manifest = build(pattern, layout="caption", prompts=["Descreve a imagem.", "O que se vê?"])
    assert len(manifest) == 3
    reader, layout, said = ShardReader(manifest, DescriptorCache()), manifest.info.layout, []
    for row in range(3):
        record, images = reader.read(row)
        assert layout is not None and images == [picture]
        messages, *_ = read_record(record, layout, manifest.key(row), 1)
        assert messages[0]["content"][0] == {"type": "image"}
        assert messages[0]["content"][1]["text"] in ("Descreve a imagem.", "O que se vê?")
        said.append(messages[1]["content"])
    assert said == ["Um cão na praia.", "Um gato.", "Um carro à chuva."]
    one, two = reasons(manifest)
    assert "no one member" in one and "UTF-8" in two


def _exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = turn, "a description"
    return exif.tobytes()


def test_pairs_and_an_image_that_stands_twice(tmp_path: Path, build: Build) -> None:
    picture = toys.encoded(toys.picture(1, 40, 60), "JPEG")
    pair = {"question": "O que é?", "chosen": "Um autocarro.", "rejected": "Um ônibus."}
    shards = [[{"0.jpg": picture, "1.jpg": picture, "json": pair}, {"json": pair}]]
    manifest = build(write_archives(tmp_path / "theirs", shards), preference=True)
    assert manifest.info.preference and manifest.tokens_rejected.min() > 0
    assert not is_damaged(validate(manifest, 0, None, Checks(50_000_000)))
    record, images = ShardReader(manifest, DescriptorCache()).read(0)
    assert images == [picture, picture] and manifest.info.layout is not None
    messages, chosen, rejected = read_record(record, manifest.info.layout, manifest.key(0), 2)
    assert (chosen, rejected) == ("Um autocarro.", "Um ônibus.")
    assert [item["type"] for item in messages[0]["content"]] == ["image", "image", "text"]


def test_images_that_would_be_rewritten_are_refused(tmp_path: Path, build: Build) -> None:
    picture = toys.picture(3, 50, 80)
    grey_alpha = picture.convert("RGBA")
    grey_alpha.putalpha(128)
    webp = io.BytesIO()
    picture.save(webp, "WEBP", lossless=True)
    images = [
        ("jpg", toys.encoded(picture, "JPEG", exif=_exif(1))),  # metadata, upright
        ("jpg", toys.encoded(picture, "JPEG") + b"trailing bytes"),
        ("jpg", toys.encoded(picture, "JPEG", exif=_exif(6))),
        ("jpg", toys.encoded(picture.convert("CMYK"), "JPEG")),
        ("png", toys.encoded(grey_alpha)),
        ("png", toys.encoded(picture.quantize(16))),
        ("webp", webp.getvalue()),
        ("png", toys.encoded(Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)))),
    ]
    samples = [
        {extension: data, "txt": f"Imagem {number}."}
        for number, (extension, data) in enumerate(images)
    ]
    pattern = write_archives(tmp_path / "theirs", [samples])
    manifest = build(pattern, layout="caption", prompts=["Descreve."])
    assert manifest.table["key"].to_pylist() == ["000000000", "000000001"]
    reader = ShardReader(manifest, DescriptorCache())
    assert [reader.read(row)[1] for row in (0, 1)] == [[images[0][1]], [images[1][1]]]
    causes = ["EXIF rotation", "mode CMYK", "mode RGBA", "mode P", "neither JPEG nor PNG", "mode I"]
    for reason, cause in zip(reasons(manifest), causes, strict=True):
        assert cause in reason and "set in_place: false" in reason


def test_what_lies_elsewhere_is_refused(tmp_path: Path, build: Build) -> None:
    picture = toys.encoded(toys.picture(1, 40, 60))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.png").write_bytes(picture)
    answer = {"role": "assistant", "content": "Isto."}
    turns = [{"role": "user", "content": "<image>O quê?"}, answer]
    samples = [{"json": {"messages": turns, "image": "a.png"}}, chats(1)[0]]
    manifest = build(write_archives(tmp_path / "theirs", [samples]).with_name("s-*.tar"))
    assert len(manifest) == 1 and "not in the archive" in reasons(manifest)[0]
    # The question in the JSON and the answer in the text; then both in the JSON.
    both = {"question": "O quê?", "txt": "Isto."}
    samples = [{"png": picture, "json": {"question": "O quê?"}, "txt": "Isto."}]
    pattern = write_archives(tmp_path / "more", [[*samples, {"png": picture, "json": both}]])
    manifest = build(pattern, "more", layout="question", columns={"answer": "txt"})
    assert len(manifest) == 1 and "no one member" in reasons(manifest)[0]


def test_hostile_members_cost_their_sample_only(tmp_path: Path, build: Build) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    picture = toys.encoded(toys.picture(1, 40, 60))
    with tarfile.open(folder / "x.tar", "w") as tar:

        def add(name: str, data: bytes = b"", link: str | None = None) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if link is not None:
                info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info, io.BytesIO(data))

        for key in ("a", "b", "../c", "d", "a"):
            if key == "b":
                add("b.png", link="/etc/passwd")
            else:
                add(f"{key}.png", picture)
            add(f"{key}.txt", b"Um texto." if key != "d" else b"")
    manifest = build(folder / "*.tar", layout="caption", prompts=["Descreve."])
    assert manifest.table["key"].to_pylist() == ["000000000"]
    causes = ["a symbolic link", "leaves the archive", "", "stands earlier"]
    for reason, cause in zip(reasons(manifest), causes, strict=True):
        assert cause in reason


def test_damage_and_change_are_found(tmp_path: Path, build: Build) -> None:
    pattern = write_archives(tmp_path / "theirs", [chats(5)])
    (archive,) = pattern.parent.iterdir()
    manifest = build(pattern)
    whole = archive.read_bytes()
    changed = bytearray(whole)
    changed[manifest.image_span[0][0] + 40] ^= 1
    assert not is_damaged(validate(manifest, 0, None, Checks(50_000_000)))
    archive.write_bytes(changed)
    report = validate(manifest, 0, None, Checks(50_000_000))
    assert [(bad["key"], bad["shard"]) for bad in report["bad"]] == [("000000000", "s-000.tar")]
    with pytest.raises(BadSample, match="CRC-32 of its image 0"):
        ShardReader(manifest, DescriptorCache()).read(0)
    archive.write_bytes(whole[:-20_000])
    with pytest.raises(ManifestError, match="s-000.tar has"):
        read_manifest(manifest.path).check_shards()
    with pytest.raises((SourceError, ValueError), match="ends (after|within)"):
        build(pattern)
    # Put back, it is examined again, as its time has changed, and is what it was.
    archive.write_bytes(whole)
    assert build(pattern).info.digest == manifest.info.digest
    moved = pattern.parent.rename(tmp_path / "moved")
    again = build(moved / "*.tar")
    assert again.shards_directory == moved and again.info.digest == manifest.info.digest


def test_a_record_is_read_as_it_was_examined() -> None:
    layout = {"layout": "auto", "columns": {}, "prompts": [], "preference": False}
    record = {
        "messages": [{"role": "user", "content": "e\u0301"}, {"role": "assistant", "content": "a"}]
    }
    messages, chosen, rejected = read_record(json.dumps(record).encode(), layout, "000000000", 0)
    assert messages[0]["content"] == "é" and chosen is rejected is None
    with pytest.raises(SampleError, match="no layout fits"):
        read_record(b"[1]", layout, "000000000", 0)
