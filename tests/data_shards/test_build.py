"""Building: quarantine, resuming, exchange, and independence of the number of workers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.schema.data import DataConfig, SourceConfig
from data_shards import build as build_module
from data_shards.build import BuildError, build_all, build_dataset
from data_shards.chat import ChatTokenizer
from data_shards.manifest import Manifest, read_manifest
from data_shards.reader import DescriptorCache, ShardReader
from data_shards.sources.rows import SourceError
from tests.data_shards import toys

ROOT = Path(__file__).resolve().parents[2]


def build(data: DataConfig, name: str = "chats") -> Manifest:
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    return build_dataset(name, data.sources[name], data, toys.GEOMETRY, tokenizer.digest())


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def data(tmp_path: Path, tokenizer_directory: Path) -> DataConfig:
    first = toys.write_parquet(tmp_path / "in" / "a.parquet", toys.chat_rows(30), group=7)
    toys.write_parquet(tmp_path / "in" / "b.parquet", toys.chat_rows(10, first=30))
    source = SourceConfig(str(first.parent / "*.parquet"), licence="CC0")
    return toys.data_config(tmp_path / "out", tokenizer_directory, chats=source)


def test_round_trip(data: DataConfig) -> None:
    manifest = build(data)
    assert len(manifest) == 40 and manifest.info.quarantined == 0
    assert len(manifest.info.shards) > 3
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
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.parquet", "quarantine.jsonl", "shards",
    ]  # fmt: skip
    assert manifest.info.shards[0].name == "chats-000000.tar"
    for shard in manifest.info.shards:
        whole = (manifest.shards_directory / shard.name).read_bytes()
        assert hashlib.sha256(whole).hexdigest() == shard.sha256


def test_the_same_bytes_from_every_number_of_workers(data: DataConfig, tmp_path: Path) -> None:
    expected = contents(build(data).path.parent)
    data.root, data.build_workers = str(tmp_path / "again"), 2
    assert contents(build(data).path.parent) == expected


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
    leftovers = [path.name for path in Path(data.root).iterdir()]
    assert sorted(leftovers) == [".chats.lock", "chats"]


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
    lines = (manifest.path.parent / "quarantine.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert manifest.info.quarantined == 4
    assert [entry["origin"] for entry in entries] == [f"a.parquet:{n}" for n in (1, 2, 4, 6)]
    reasons = [entry["reason"] for entry in entries]
    assert "image 0: not a readable image" in reasons[0]
    assert "answer of turn 1 is empty" in reasons[1]
    assert "200x200 px are more than data.images.max_pixels=39999" in reasons[2]
    assert "1 image placeholders but 0 images" in reasons[3]


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
        BuildError, match=r"no sample is usable, 2 rows refused, the first \(a.jsonl:1"
    ):
        build(data)
    assert not (tmp_path / "out" / "chats").exists()
    assert (
        len((tmp_path / "out" / ".chats.building" / "quarantine.jsonl").read_text().split("\n"))
        == 3
    )


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
    with pytest.raises(BuildError, match=r"data\.sources\.chats\.input=.* matches no file"):
        build(data)


def test_two_builds_of_one_data_set_at_once(data: DataConfig) -> None:
    from data_shards.dataset_folder import DatasetFolder

    with DatasetFolder(Path(data.root), "chats").locked():
        with pytest.raises(ValueError, match="is being built by another process"):
            build(data)
    build(data)


class Killed(BaseException):
    """Stands for a power cut."""


@pytest.mark.parametrize("point", ["part", "publish", "first rename", "second rename"])
def test_a_build_cut_at_any_point_ends_with_the_same_bytes(
    data: DataConfig, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards.dataset_folder import DatasetFolder

    expected = contents(build(data).path.parent)
    shutil.rmtree(data.root)
    older = toys.write_parquet(tmp_path / "older.parquet", toys.chat_rows(3))
    current = data.sources["chats"]
    data.sources["chats"] = SourceConfig(str(older))
    old_digest = build(data).info.digest
    data.sources["chats"] = current

    calls = {"count": 0}

    def cut_after(count: int, real):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            calls["count"] += 1
            if calls["count"] > count:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        if point == "part":
            patched.setattr(DatasetFolder, "write_part", cut_after(2, DatasetFolder.write_part))
        elif point == "publish":
            patched.setattr(DatasetFolder, "publish", cut_after(0, DatasetFolder.publish))
        else:
            import data_shards.dataset_folder as module

            count = 0 if point == "first rename" else 1
            patched.setattr(module.os, "rename", cut_after(count, os.rename))
        with pytest.raises(Killed):
            build(data)
    final = Path(data.root) / "chats"
    if point == "second rename":
        # The new data set was complete: it takes its place without being built again.
        with DatasetFolder(Path(data.root), "chats").locked():
            assert contents(final) == expected
    else:
        assert read_manifest(final / "manifest.parquet").info.digest == old_digest
    assert contents(build(data).path.parent) == expected
    assert sorted(p.name for p in Path(data.root).iterdir()) == [".chats.lock", "chats"]


def test_resuming_does_not_redo_finished_shards(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_shards.dataset_folder import DatasetFolder

    real, written = DatasetFolder.write_part, []

    def write_part(self: DatasetFolder, number: int, part: object) -> None:
        if len(written) == 3:
            raise Killed
        written.append(number)
        real(self, number, part)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(DatasetFolder, "write_part", write_part)
        with pytest.raises(Killed):
            build(data)
    shards = Path(data.root) / ".chats.building" / "shards"
    inodes = {p.name: p.stat().st_ino for p in shards.iterdir()}
    manifest = build(data)
    for number in range(3):
        name = f"chats-{number:06d}.tar"
        assert (manifest.shards_directory / name).stat().st_ino == inodes[name]
    assert len(manifest) == 40


COMMAND = """
import sys
from pathlib import Path
from conf.schema.data import SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from tests.data_shards import toys
if __name__ == "__main__":
    root, tokenizer, source, workers = sys.argv[1:]
    data = toys.data_config(Path(root), Path(tokenizer), chats=SourceConfig(source, licence="CC0"))
    data.build_workers = int(workers)
    digest = ChatTokenizer.from_directory(tokenizer).digest()
    build_dataset("chats", data.sources["chats"], data, toys.GEOMETRY, digest)
"""


def test_kill_9_and_again_gives_identical_bytes(data: DataConfig, tmp_path: Path) -> None:
    """Real processes, killed as soon as the n-th shard stands; workers die with their parent."""
    source = Path(data.sources["chats"].input).parent
    toys.write_parquet(source / "c.parquet", toys.chat_rows(80, first=40))
    expected = contents(build(data).path.parent)
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    root = tmp_path / "killed"
    arguments = [str(root), data.tokenizer, data.sources["chats"].input, "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    for wanted in (2, 9):
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], env=environment,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        parts = root / ".chats.building" / "parts"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if parts.is_dir() and sum(p.suffix == ".parquet" for p in parts.iterdir()) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        assert not (root / "chats").exists()
        assert _group_ends(process.pid), "workers outlived their parent"
    assert kills == 2
    subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, check=True, timeout=100,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert contents(root / "chats") == expected


def _group_ends(group: int) -> bool:
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return False


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
    assert "captions: 40 samples, 0 refused" in capsys.readouterr().out
    assert len(read_manifest(Path(data.root) / "captions" / "manifest.parquet")) == 40
    assert build_module.main([*overrides, "only=[nada]"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: only= names nada") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("../x", {}, "a name is at most"),
        ("a.b", {}, "a name is at most"),
        ("chats", {"columns": {"image": "foto"}}, "names image; the fields are messages, images"),
        ("chats", {"format": "csv"}, "use parquet or jsonl"),
    ],
)
def test_sources_that_are_configured_wrong(
    data: DataConfig, name: str, changes: dict, words: str
) -> None:
    data.sources[name] = SourceConfig(data.sources["chats"].input, **changes)
    with pytest.raises(BuildError, match=words):
        build(data, name)
