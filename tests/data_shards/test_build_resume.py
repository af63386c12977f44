"""Builds that are killed, shared out, or run at once: always the same bytes, nothing done twice."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema.data import DataConfig, SourceConfig
from data_shards import block_work, build_run, dataset_folder
from data_shards.build_plan import BuildError, BuildPlan, Share
from data_shards.build_run import BuildRun
from data_shards.chat import ChatTokenizer
from data_shards.dataset_folder import DatasetFolder
from data_shards.examined import ExaminedFolder
from data_shards.manifest import read_manifest
from data_shards.stamped_folder import FolderInUse
from data_shards.workers import Workers
from data_shards.writer import ShardWriter
from tests.data_shards import toys
from tests.data_shards.test_build import build, chats

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for a power cut."""


def contents(folder: Path) -> dict[str, str]:
    """Every file and its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> DataConfig:
    """Three blocks; one row is bad, and three stand twice."""
    folder = tmp_path_factory.mktemp("sources")
    data = chats(folder, tokenizer_directory)
    rows = toys.chat_rows(12, first=34)
    rows[7]["images"] = [b"not an image"]
    toys.write_parquet(folder / "in" / "b.parquet", rows)
    toys.write_parquet(folder / "in" / "c.parquet", toys.chat_rows(3, first=2))
    return data


@pytest.fixture(scope="module")
def expected(sources: DataConfig) -> dict[str, str]:
    """Of a build that nothing disturbed."""
    manifest = build(sources)
    assert len(manifest) == 41 and manifest.info.quarantined == 4
    return contents(manifest.path.parent)


@pytest.fixture
def data(sources: DataConfig, tmp_path: Path) -> DataConfig:
    """To be built somewhere else."""
    return replace(sources, root=str(tmp_path / "out"), sources=dict(sources.sources))


def cut(patched: pytest.MonkeyPatch, where: object, name: str, after: int) -> None:
    """Let `name` be called `after` times, then cut the power."""
    real, calls = getattr(where, name), {"count": 0}

    def call(*arguments, **options):  # type: ignore[no-untyped-def]
        calls["count"] += 1
        if calls["count"] > after:
            raise Killed
        return real(*arguments, **options)

    patched.setattr(where, name, call)


POINTS = {
    "examined": (ExaminedFolder, "write", 1),
    "left out": (DatasetFolder, "write_left_out", 0),
    "shard": (ShardWriter, "close", 4),
    "manifest": (build_run, "finish", 0),
    "publish": (DatasetFolder, "publish", 0),
    "first rename": (dataset_folder.os, "rename", 0),
    "second rename": (dataset_folder.os, "rename", 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_build_cut_at_any_point_ends_with_the_same_bytes(
    data: DataConfig,
    expected: dict[str, str],
    tmp_path: Path,
    point: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = toys.write_parquet(tmp_path / "older.parquet", toys.chat_rows(3))
    current = data.sources["chats"]
    data.sources["chats"] = SourceConfig(str(older))
    old_digest = build(data).info.digest
    data.sources["chats"] = current
    with monkeypatch.context() as patched:
        where, name, after = POINTS[point]
        if "rename" in point:  # only those of `publish`
            real = DatasetFolder.publish

            def publish(self: DatasetFolder) -> None:
                cut(patched, where, name, after)
                real(self)

            patched.setattr(DatasetFolder, "publish", publish)
        else:
            cut(patched, where, name, after)
        with pytest.raises(Killed):
            build(data)
    final = Path(data.root) / "chats"
    if point == "manifest":  # what a real kill leaves of files and folders that were growing
        building = final.with_name(".chats.building")
        (building / "index.tmp").mkdir()
        for name in ("index.tmp/tokens.npy", "shards/chats-00000-0009.tar.node.7.tmp"):
            (building / name).write_bytes(b"half")
    if point != "second rename":
        assert read_manifest(final / "manifest.parquet").info.digest == old_digest
    else:  # complete: it takes its place without being built again
        monkeypatch.setattr(Workers, "run", None)
    build(data)
    assert contents(final) == expected
    left = {path.name for path in Path(data.root).iterdir() if path.suffix != ".lock"}
    assert left == {".chats.examined", "chats"}


def test_what_is_finished_is_not_done_again(
    data: DataConfig, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cut(patched, DatasetFolder, "write_part", 4)
        with pytest.raises(Killed):
            build(data)
    shards = Path(data.root) / ".chats.building" / "shards"
    before = {path.name: path.stat().st_ino for path in shards.iterdir()}
    examined = Path(data.root) / ".chats.examined"
    stamps = {path: path.stat().st_mtime_ns for path in examined.glob("*.parquet")}
    monkeypatch.setattr(block_work, "examine_block", None)
    manifest = build(data)
    kept = sorted(before)[:4]
    for name in kept:  # the fourth one is of a block that was not finished
        assert (manifest.shards_directory / name).stat().st_ino == before[name]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert contents(manifest.path.parent) == expected


def run(data: DataConfig, share: Share | None = None) -> None:
    digest = ChatTokenizer.from_directory(data.tokenizer).digest()
    BuildRun(BuildPlan(data, toys.GEOMETRY, digest, None)).run(share)


@pytest.mark.parametrize("parts", [2, 5])
def test_shares_in_any_order(data: DataConfig, expected: dict[str, str], parts: int) -> None:
    """As an array runs them: more parts than blocks, and one that comes before its time."""
    shares = [
        Share("chats", phase, part, parts)
        for phase in ("examine", "write")
        for part in range(parts)
    ]
    random.Random(parts).shuffle(shares)
    for number, share in enumerate(shares):
        assert (Path(data.root) / "chats").exists() <= (number > parts - 1)
        run(data, share)
    assert contents(Path(data.root) / "chats") == expected


def test_shares_that_are_none() -> None:
    assert Share.parse("", "", "0/1") is None
    assert Share.parse("a", "write", "1/2") == Share("a", "write", 1, 2)
    for words in (
        ("a", "", "0/1"),
        ("", "write", "0/1"),
        ("a", "look", "0/1"),
        ("a", "write", "2/2"),
    ):
        with pytest.raises(BuildError, match="part="):
            Share.parse(*words)


def test_another_build_from_other_inputs_is_refused(data: DataConfig) -> None:
    folder = ExaminedFolder.of_source(Path(data.root), "chats")
    with folder.stamped().opened("another digest"):
        with pytest.raises(FolderInUse, match=r"chats\.examined is being built by another process"):
            build(data)
    build(data)


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
    data.build_workers, data.block_rows = int(workers), 16
    digest = ChatTokenizer.from_directory(tokenizer).digest()
    build_dataset("chats", data.sources["chats"], data, toys.GEOMETRY, digest)
"""


def test_kill_9_and_again_and_two_at_once(
    data: DataConfig, expected: dict[str, str], tmp_path: Path
) -> None:
    """Real processes, killed at an instant nobody chose; then two that work together."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    root = Path(data.root)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(workers: int) -> subprocess.Popen[bytes]:
        arguments = [str(root), data.tokenizer, data.sources["chats"].input, str(workers)]
        return subprocess.Popen(
            [sys.executable, str(script), *arguments], env=environment,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    examined, parts = root / ".chats.examined", root / ".chats.building" / "work" / "parts"
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    for workers, folder, pattern in ((1, examined, "?????.parquet"), (2, parts, "*-*.parquet")):
        process = start(workers)
        deadline = time.monotonic() + 60
        while not any(folder.glob(pattern)) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _group_ends(process.pid), "workers outlived their parent"
    both = [start(1), start(1)]
    assert [process.wait(100) for process in both] == [0, 0], seed
    assert contents(root / "chats") == expected, seed


def _group_ends(group: int) -> bool:
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return False
