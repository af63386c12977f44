"""Killed or out of room, an export goes on, and leaves nothing that looks done."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint_tensors import bytes_of
from pipeline.files import read_json, write_json
from pipeline.handoff import read_done
from pipeline.manifest import MANIFEST
from tests.tools.dying import changes, status
from tests.tools.kills import content, moments, numbers, with_limit
from tools import hf_export
from tools.aside import only_one
from tools.export_weights import STATE

SHARDS = 60_000  # bytes: several files of the small model


@pytest.fixture(scope="module")
def stage(run_directory: Path) -> Path:
    return run_directory / "import"


@pytest.fixture(scope="module")
def unbroken(stage: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an export in several files holds."""
    out = tmp_path_factory.mktemp("unbroken") / "hf"
    hf_export.export(hf_export.Request(stage, out, shard_bytes=SHARDS))
    return content(out)


def exporting(stage: Path, out: Path, **settings: Any) -> Callable[[], None]:
    return lambda: hf_export.export(hf_export.Request(stage, out, shard_bytes=SHARDS, **settings))


def test_export_killed_at_any_moment(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    count = changes(exporting(stage, tmp_path / "counted"), tmp_path / "count")
    resumed = 0
    for at in moments(count, 16):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        out = folder / "hf"
        ended = status(exporting(stage, out), at)
        assert ended in (0, -signal.SIGKILL)  # threads: the last moments may not come
        if out.exists():
            assert content(out) == unbroken, f"killed at {at} of {count}"
        else:
            aside = folder / ".hf.partial"
            if (aside / STATE).is_file():
                resumed += bool(read_json(aside / STATE, "", "")["whole"])
            exporting(stage, out)()
            assert content(out) == unbroken, f"killed at {at} of {count}"
            assert [path.name for path in folder.iterdir()] == ["hf"]
        shutil.rmtree(folder)
    assert resumed > 4, "hardly any of them had a whole file to go on with"


def test_export_killed_again_and_again(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    count = changes(exporting(stage, tmp_path / "counted"), tmp_path / "count")
    (tmp_path / "count").unlink()
    shutil.rmtree(tmp_path / "counted")
    draw = random.Random(4)
    kills = 0
    while status(exporting(stage, tmp_path / "hf"), draw.randint(1, count // 2)):
        assert not (tmp_path / "hf").exists()
        kills += 1
        assert kills < 40
    assert kills > 2
    assert content(tmp_path / "hf") == unbroken
    shutil.rmtree(tmp_path / "hf")
    while status(exporting(stage, tmp_path / "hf"), after_s=0.02 + 0.1 * kills * draw.random()):
        assert not (tmp_path / "hf").exists()  # killed at a time, not at a change
        kills += 1
    assert content(tmp_path / "hf") == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_interrupted_export_ends_at_once_and_goes_on(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    count = changes(exporting(stage, tmp_path / "counted"), tmp_path / "count")
    for at in moments(count, 6)[1:-1]:
        out = tmp_path / f"at{at}"
        ended = status(exporting(stage, out), at, signal.SIGINT)
        assert ended in (0, 130)
        if not out.exists():
            exporting(stage, out)()
        assert content(out) == unbroken
    assert not list(tmp_path.glob(".*"))


def killed(action: Callable[[], Any], aside: Path, whole: int, note: Path) -> None:
    """Kill `action` when at least `whole` of its files are done, and none is being finished."""
    count = changes(action, note)
    for at in range(count // 2, count):
        shutil.rmtree(aside.with_name("hf"), ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        if status(action, at) and (aside / STATE).is_file():
            if len(read_json(aside / STATE, "", "")["whole"]) >= whole:
                return
    raise AssertionError("never so far")


def test_other_settings_begin_anew(stage: Path, tmp_path: Path) -> None:
    killed(exporting(stage, tmp_path / "hf"), tmp_path / ".hf.partial", 2, tmp_path / "count")
    exporting(stage, tmp_path / "hf", dtype=torch.bfloat16, names="new")()
    exporting(stage, tmp_path / "other", dtype=torch.bfloat16, names="new")()
    assert content(tmp_path / "hf") == content(tmp_path / "other")


@pytest.mark.parametrize("keeps_time", [False, True], ids=["another", "with the same times"])
def test_checkpoint_that_was_replaced_is_read_again(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path, keeps_time: bool
) -> None:
    """What was written from damaged numbers before they were found must not be taken over."""
    copy = tmp_path / "import"
    shutil.copytree(stage, copy)
    good = {path: path.read_bytes() for path in copy.rglob("*.distcp")}
    times = {path: path.stat().st_mtime_ns for path in good}
    firsts = [bytes_of(tensor)[:32].tobytes() for tensor in numbers(stage).values()]
    for path, data in good.items():
        spoiled = bytearray(data)
        for first in firsts:
            if len(set(first)) > 8:  # not zeros, which are everywhere
                spoiled[spoiled.find(first)] ^= 1
        path.write_bytes(spoiled)
        os.utime(path, ns=(times[path], times[path]))
    aside = tmp_path / ".hf.partial"

    def as_if_nothing_was_verified() -> None:
        hf_export.Check.__call__ = lambda self, whole=False: None  # type: ignore[method-assign]
        exporting(copy, tmp_path / "hf")()

    killed(as_if_nothing_was_verified, aside, 2, tmp_path / "count")
    for path, data in good.items():
        path.write_bytes(data)
        if keeps_time:
            os.utime(path, ns=(times[path], times[path]))
    exporting(copy, tmp_path / "hf")()
    assert content(tmp_path / "hf") == unbroken


def test_checkpoint_changed_while_it_is_read(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "import"
    shutil.copytree(stage, copy)
    shard = next(copy.rglob("*.distcp"))
    original = hf_export._write_small_files

    def meanwhile(*arguments: Any) -> None:
        original(*arguments)
        data = shard.read_bytes()
        shard.unlink()
        shard.write_bytes(data)

    monkeypatch.setattr(hf_export, "_write_small_files", meanwhile)
    with pytest.raises(ValueError, match="was changed while it was read; run the same command"):
        exporting(copy, tmp_path / "hf")()
    assert [path.name for path in tmp_path.iterdir()] == ["import"]


def test_manifest_of_another_checkpoint_is_refused(stage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "import"
    shutil.copytree(stage, copy)
    manifest = copy / read_done(copy).checkpoint / MANIFEST
    write_json(manifest, {**read_json(manifest, "", ""), "code_version": "another"})
    with pytest.raises(ValueError, match=r"MANIFEST.json is not the one that DONE.json of import"):
        exporting(copy, tmp_path / "hf")()
    assert [path.name for path in tmp_path.iterdir()] == ["import"]


def test_second_export_at_the_same_time_is_refused(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []
    original = hf_export._write_small_files

    def tries_again(*arguments: Any) -> None:
        with pytest.raises(ValueError, match="another command is writing .*hf.partial") as caught:
            exporting(stage, tmp_path / "hf")()
        refusals.append(caught.value)
        original(*arguments)

    monkeypatch.setattr(hf_export, "_write_small_files", tries_again)
    exporting(stage, tmp_path / "hf")()
    assert len(refusals) == 1
    assert content(tmp_path / "hf") == unbroken
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_lock_that_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the holder removed it, locked after: a third would hold a new file."""
    from data_shards.locks import FileLock

    lock = tmp_path / "lock"
    original = FileLock.try_exclusive

    def too_late(self: FileLock) -> bool:
        lock.unlink()
        return original(self)

    monkeypatch.setattr(FileLock, "try_exclusive", too_late)
    with pytest.raises(ValueError, match="busy; wait"), only_one(lock, "busy"):
        pass


@pytest.mark.slow
def test_command_killed_in_a_process_of_its_own(
    stage: Path, run_directory: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    command = [sys.executable, "-m", "tools.hf_export", f"stage={stage}", f"out={out}"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / ".hf.partial").is_dir() and first.poll() is None:
        time.sleep(0.0005)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not out.exists()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert content(out) == content(run_directory / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_export_without_room_says_where_and_goes_on(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    assert with_limit(exporting(stage, tmp_path / "hf"), 30_000, tmp_path / "said") == 1
    said = (tmp_path / "said").read_text()
    assert re.search(r"error: .*/\.hf\.partial could not be written \(.*\); make room", said), said
    assert not (tmp_path / "hf").exists()
    exporting(stage, tmp_path / "hf")()
    assert content(tmp_path / "hf") == unbroken


def test_full_disk(stage: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    """The system's own: a file system of a few pages."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match=r"hf\.partial could not be written \(No space left"):
            exporting(stage, small / "hf")()
        assert not (small / "hf").exists()
        kept = read_json(small / ".hf.partial" / STATE, "", "")["whole"]
        assert kept, "not even the first file was whole"
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        exporting(stage, small / "hf")()
        assert content(small / "hf") == unbroken
        assert [path.name for path in small.iterdir()] == ["hf"]
    finally:
        subprocess.run(["umount", str(small)], check=True)
