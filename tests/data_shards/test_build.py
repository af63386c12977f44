"""Building: what comes out, the quarantine, duplicates, and when it is built again."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conf.schema.data import DataConfig, SourceConfig
from data_shards import build as build_module
from data_shards.build import BuildError, build_all, build_dataset
from data_shards.chat import ChatTokenizer
from data_shards.manifest import Manifest, read_manifest
from data_shards.prepare import SourceChanged
from data_shards.reader import DescriptorCache, ShardReader
from data_shards.sources.rows import SourceError
from tests.data_shards import toys

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = (
    "manifest.parquet", "index", "quarantine", "shards", "hits.json", "card.html", "card.parquet"
)  # fmt: skip


def build(data: DataConfig, name: str = "chats") -> Manifest:
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    return build_dataset(name, data.sources[name], data, toys.GEOMETRY, tokenizer.digest())


@pytest.fixture
def data(tmp_path: Path, tokenizer_directory: Path) -> DataConfig:
    return chats(tmp_path, tokenizer_directory)


def chats(folder: Path, tokenizer: Path) -> DataConfig:
    """Forty rows in two files, as three blocks of several shards each."""
    first = toys.write_parquet(folder / "in" / "a.parquet", toys.chat_rows(30), group=7)
    toys.write_parquet(folder / "in" / "b.parquet", toys.chat_rows(10, first=30))
    source = SourceConfig(str(first.parent / "*.parquet"), licence="CC0")
    data = toys.data_config(folder / "out", tokenizer, chats=source)
    data.block_rows = 16
    return data


def reasons(manifest: Manifest) -> list[dict[str, str]]:
    """Lines of the quarantine."""
    path = manifest.path.parent / "quarantine" / "reasons.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_round_trip(data: DataConfig) -> None:
    manifest = build(data)
    assert len(manifest) == 40 and manifest.info.quarantined == 0
    names = [shard.name for shard in manifest.info.shards]
    assert len(names) > 5 and names == sorted(names)
    assert {name[:12] for name in names} == {f"chats-{block:05d}-" for block in range(3)}
    assert all(shard.size <= data.shard_bytes + 2048 for shard in manifest.info.shards)
    reader = ShardReader(manifest, DescriptorCache())
    for row, source in enumerate(toys.chat_rows(40)):
        record, images = reader.read(row)
        parsed = json.loads(record)
        assert parsed["messages"] == source["messages"] and images == source["images"]
        assert parsed["licence"] == "CC0" and parsed["source"] == "chats"
        origin = f"a.parquet:{row}" if row < 30 else f"b.parquet:{row - 30}"
        assert parsed["origin"] == origin
    folder = manifest.path.parent
    assert (
        {"manifest.parquet", "index", "quarantine", "shards", "hits.json"}
        <= {path.name for path in folder.iterdir()}
        <= {*PUBLISHED}
    )
    for shard in manifest.info.shards:
        whole = (manifest.shards_directory / shard.name).read_bytes()
        assert hashlib.sha256(whole).hexdigest() == shard.sha256


def test_an_unchanged_data_set_is_left_alone(
    data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build(data)
    before = manifest.path.stat().st_mtime_ns, manifest.path.stat().st_ino
    capsys.readouterr()
    build(data)
    assert capsys.readouterr().out == "chats: up to date, 40 samples\n"
    assert (manifest.path.stat().st_mtime_ns, manifest.path.stat().st_ino) == before


def test_changed_inputs_and_damaged_results_are_built_again(data: DataConfig) -> None:
    first = build(data)
    source = Path(data.sources["chats"].input).parent / "b.parquet"
    toys.write_parquet(source, toys.chat_rows(4, first=500))
    second = build(data)
    assert len(second) == 34 and second.info.digest != first.info.digest
    data.sources["chats"].licence = "other"
    third = build(data)
    assert third.info.digest != second.info.digest
    shard = third.shards_directory / third.info.shards[0].name
    os.truncate(shard, 100)
    assert build(data).info == third.info and shard.stat().st_size > 100
    third.path.write_bytes(b"")
    assert build(data).info == third.info
    leftovers = {path.name for path in Path(data.root).iterdir() if not path.suffix == ".lock"}
    assert leftovers == {".chats.examined", "chats"}


def test_bad_rows_are_quarantined_with_the_reason(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    rows = toys.chat_rows(8)
    rows[1]["images"] = [b"not an image"]
    rows[2]["messages"][-1]["content"] = " "
    rows[4]["images"] = [toys.encoded(toys.picture(0, 200, 200))]
    rows[6]["messages"][1]["content"] = "<image>"
    path = toys.write_parquet(tmp_path / "a.parquet", rows)
    data = toys.data_config(tmp_path / "out", tokenizer_directory, chats=SourceConfig(str(path)))
    data.images.max_pixels = 39_999
    manifest = build(data)
    assert manifest.table["key"].to_pylist() == [f"{n:09d}" for n in (0, 3, 5, 7)]
    entries = reasons(manifest)
    assert manifest.info.quarantined == 4
    assert [entry["origin"] for entry in entries] == [f"a.parquet:{n}" for n in (1, 2, 4, 6)]
    said = [entry["reason"] for entry in entries]
    assert "image 0: not a readable image" in said[0]
    assert "answer of turn 1 is empty" in said[1]
    assert "200x200 px are more than data.images.max_pixels=39999" in said[2]
    assert "1 image placeholders but 0 images" in said[3]
    with tarfile.open(manifest.path.parent / "quarantine" / "samples.tar") as archive:
        kept = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert [n for n in kept if n.endswith(".json")] == [f"{n:09d}.json" for n in (1, 2, 4, 6)]
    assert kept["000000001.0.bin"] == b"not an image"
    assert kept["000000004.0.bin"] == rows[4]["images"][0]
    assert json.loads(kept["000000006.json"])["images"] == []


@pytest.mark.parametrize("limit", [2 << 20, 90_000])
def test_bad_samples_are_kept_up_to_a_limit(
    data: DataConfig, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards import quarantine

    data.images.max_pixels = 64 * 64 - 1  # all images but the smallest
    monkeypatch.setattr(quarantine, "MOST_SAMPLES", 12)
    monkeypatch.setattr(quarantine, "MOST_BYTES_OF_ALL", limit)
    manifest = build(data)
    refused = [entry["key"] for entry in reasons(manifest)]
    assert len(refused) > 12
    path = manifest.path.parent / "quarantine" / "samples.tar"
    with tarfile.open(path) as archive:
        kept = [name[:9] for name in archive.getnames() if name.endswith(".json")]
    assert kept == refused[: len(kept)] and len(kept) == (12 if limit > 1 << 20 else 8)
    assert path.stat().st_size <= limit + 1024


def test_jsonl_with_image_paths(tmp_path: Path, tokenizer_directory: Path) -> None:
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    image = toys.encoded(toys.picture(0, 30, 40))
    (tmp_path / "in" / "pictures" / "a.png").write_bytes(image)
    messages = toys.chat_rows(1)[0]["messages"]
    rows = [
        {"messages": messages, "images": ["pictures/a.png"]},
        {"messages": messages, "images": ["../out/secret.png"]},
        b"{",
        {"messages": messages, "images": ["pictures/none.png"]},
    ]
    path = toys.write_jsonl(tmp_path / "in" / "a.jsonl", rows)
    source = SourceConfig(str(path), format="jsonl")
    data = toys.data_config(tmp_path / "out", tokenizer_directory, chats=source)
    manifest = build(data)
    assert len(manifest) == 1 and manifest.info.quarantined == 3
    assert ShardReader(manifest, DescriptorCache()).read(0)[1] == [image]
    assert manifest.image_hw.tolist() == [[30, 40]]


def test_everything_bad_is_an_error_that_says_why(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    path = toys.write_jsonl(tmp_path / "a.jsonl", [b"{", b"["])
    source = SourceConfig(str(path), format="jsonl")
    data = toys.data_config(tmp_path / "out", tokenizer_directory, chats=source)
    with pytest.raises(
        BuildError, match=r"no sample is usable, 2 rows refused, 0 duplicates, the first \(a.json"
    ):
        build(data)
    assert not (tmp_path / "out" / "chats").exists()
    assert (
        tmp_path / "out" / ".chats.building" / "quarantine" / "reasons.jsonl"
    ).read_text().count("\n") == 2


def test_preference_rows(tmp_path: Path, tokenizer_directory: Path) -> None:
    rows = toys.pair_rows(5)
    rows[2]["rejected"] = rows[2]["chosen"]
    path = toys.write_parquet(tmp_path / "a.parquet", rows)
    source = SourceConfig(str(path), preference=True)
    data = toys.data_config(tmp_path / "out", tokenizer_directory, chats=source)
    manifest = build(data)
    assert len(manifest) == 4 and manifest.info.quarantined == 1 and manifest.info.preference
    record = json.loads(ShardReader(manifest, DescriptorCache()).read(0)[0])
    assert (record["chosen"], record["rejected"]) == (rows[0]["chosen"], rows[0]["rejected"])


def test_sources_that_cannot_be_read_at_all(data: DataConfig) -> None:
    source = Path(data.sources["chats"].input).parent / "b.parquet"
    good = build(data).info.digest
    whole = source.read_bytes()
    source.write_bytes(whole[:-9])
    with pytest.raises(SourceError, match=r"b\.parquet is not readable as Parquet"):
        build(data)
    final = Path(data.root) / "chats" / "manifest.parquet"
    assert read_manifest(final).info.digest == good  # the old data set is still there
    data.sources["chats"].input = str(source.parent / "none*.parquet")
    with pytest.raises(SourceError, match=r"data\.sources\.chats\.input=.* matches no file"):
        build(data)


def test_disk_full_leaves_no_data_set(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_shards.writer import ShardWriter

    real, count = ShardWriter.add, {"n": 0}

    def add(self: ShardWriter, *arguments):  # type: ignore[no-untyped-def]
        count["n"] += 1
        if count["n"] == 20:
            raise OSError(28, "No space left on device")
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", add)
        with pytest.raises(OSError, match="No space left"):
            build(data)
    assert not (Path(data.root) / "chats").exists()
    assert not list(Path(data.root).rglob("*.tmp"))
    assert len(build(data)) == 40


def test_only_and_unknown_names(data: DataConfig) -> None:
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    model = toys.model_config(tokenizer)
    data.sources["other"] = SourceConfig("/nowhere/*.parquet")
    build_all(data, model, only=["chats"])
    assert (Path(data.root) / "chats" / "manifest.parquet").exists()
    assert "Not built yet: other" in (Path(data.root) / "card.html").read_text(encoding="utf-8")
    with pytest.raises(BuildError, match="only= names nada; data.sources has chats, other"):
        build_all(data, model, only=["nada"])


def test_the_command_says_one_line_and_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_shards.build", "data=demo", "data.tokenizer=/nowhere"],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: /nowhere/tokenizer_config.json cannot be read")


def test_the_command_builds_what_it_is_asked_to(
    data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    image_token_id = ChatTokenizer.from_directory(data.tokenizer).image_token_id
    overrides = [
        "data=demo", "model=tiny", f"model.image_token_id={image_token_id}",
        f"data.root={data.root}", f"data.tokenizer={data.tokenizer}",
        f"data.sources.captions.input={data.sources['chats'].input}",
    ]  # fmt: skip
    assert build_module.main([*overrides, "only=[captions]"]) == 0
    assert "captions: 40 samples, 0 refused, 0 duplicates" in capsys.readouterr().out
    assert len(read_manifest(Path(data.root) / "captions" / "manifest.parquet")) == 40
    assert build_module.main([*overrides, "only=[nada]"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: only= names nada") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("../x", {}, "a name is at most"),
        ("a.b", {}, "a name is at most"),
        ("chats", {"columns": {"images": "foto"}}, "no column foto"),
        ("chats", {"format": "csv"}, "is none of parquet, jsonl"),
    ],
)
def test_sources_that_are_configured_wrong(
    data: DataConfig, name: str, changes: dict, words: str
) -> None:
    data.sources[name] = SourceConfig(data.sources["chats"].input, **changes)
    with pytest.raises((BuildError, SourceError), match=words):
        build(data, name)


# --- duplicates -----------------------------------------------------------------------------------


def test_the_first_of_two_alike_stays(
    tmp_path: Path, tokenizer_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = toys.chat_rows(12)
    first = toys.write_parquet(tmp_path / "first.parquet", [*rows[:6], rows[1]])
    second = toys.write_parquet(tmp_path / "second.parquet", [*rows[4:], rows[9]])
    blank = {**rows[3], "images": []}
    tests = toys.write_parquet(tmp_path / "tests.parquet", [rows[2], rows[8], blank])
    data = toys.data_config(
        tmp_path / "out",
        tokenizer_directory,
        first=SourceConfig(str(first)),
        second=SourceConfig(str(second)),
    )
    data.duplicates.evaluation = {"tests": SourceConfig(str(tests))}
    model = toys.model_config(ChatTokenizer.from_directory(data.tokenizer))

    def keys(name: str) -> list[int]:
        manifest = read_manifest(Path(data.root) / name / "manifest.parquet")
        return [int(key) for key in manifest.table["key"].to_pylist()]

    build_all(data, model)
    assert keys("first") == [0, 1, 3, 4, 5]  # 2 is of the evaluation set, 6 is row 1 again
    assert keys("second") == [2, 3, 5, 6, 7]  # 0, 1 are in the first; 4 is evaluated; 8 is row 5
    manifest = read_manifest(Path(data.root) / "second" / "manifest.parquet")
    assert [(entry["key"], entry["kind"]) for entry in reasons(manifest)] == [
        (f"{number:09d}", "duplicate") for number in (0, 1, 4, 8)
    ]
    assert "row 4 of first" in reasons(manifest)[0]["reason"]
    said = capsys.readouterr().out
    assert "5 samples, 0 refused, 4 duplicates" in said
    assert "note: 1 rows of evaluation set tests cannot be compared, the first (tests.pa" in said
    build_all(data, model, only=["second"])  # the first is examined, so it counts: up to date
    assert capsys.readouterr().out == "second: up to date, 5 samples\n"
    for name in ("first", ".first.examined"):
        (Path(data.root) / name).rename(tmp_path / name)
    build_all(data, model, only=["second"])
    assert "note: second is not compared with first, not examined yet" in capsys.readouterr().out
    assert keys("second") == [0, 1, 2, 3, 5, 6, 7]
    data.duplicates.across_sources = False
    build_all(data, model)
    assert keys("first") == [0, 1, 3, 4, 5] and keys("second") == [0, 1, 2, 3, 5, 6, 7]


def test_images_that_changed_since_they_were_examined(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards import build_run

    (tmp_path / "in").mkdir()
    picture = tmp_path / "in" / "a.png"
    picture.write_bytes(toys.encoded(toys.picture(0, 30, 40)))
    messages = toys.chat_rows(1)[0]["messages"]
    rows = toys.write_jsonl(
        tmp_path / "in" / "a.jsonl", [{"messages": messages, "images": ["a.png"]}]
    )
    data = toys.data_config(
        tmp_path / "out", tokenizer_directory, chats=SourceConfig(str(rows), format="jsonl")
    )
    real = build_run.find_duplicates

    def meanwhile(*arguments):  # type: ignore[no-untyped-def]
        picture.write_bytes(toys.encoded(toys.picture(1, 30, 40)))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build_run, "find_duplicates", meanwhile)
        with pytest.raises(SourceChanged, match=r"row a\.jsonl:1 is no longer .*image 0 differs"):
            build(data)
    assert not (tmp_path / "out" / "chats").exists()
    with pytest.raises(SourceChanged, match="touch the source file"):
        build(data)
    os.utime(rows, (1, 1))
    assert len(build(data)) == 1
