"""Killed or out of room, import, export and averaging go on or leave nothing that looks done."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint_files import step_directory
from pipeline.checkpoint_tensors import CheckpointTensors, bytes_of
from pipeline.files import digest_and_fsync, read_json, write_json
from pipeline.handoff import DONE, HandoffError, read_done, write_done
from pipeline.manifest import MANIFEST, read_manifest, verify_files
from tests.tools.dying import changes, status
from tests.tools.small_backbones import OVERRIDES
from tools import average_checkpoints, hf_export, hf_import
from tools.aside import only_one
from tools.command import run
from tools.export_weights import STATE

SHARDS = 60_000  # bytes: several files of the small model


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def moments(count: int, number: int) -> list[int]:
    """The first and last of `count` moments, and `number` between that are the same in every run;
    half of them in the last tenth, where names are given."""
    draw, late = random.Random(count), max(count - count // 10, 2)
    between = draw.sample(range(2, late), min(number // 2, late - 2))
    between += draw.sample(range(late, count), min(number // 2, count - late))
    return [1, *sorted(between), count]


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


def numbers(stage: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's checkpoint, whose files are verified first."""
    checkpoint = stage / read_done(stage).checkpoint
    verify_files(checkpoint, read_manifest(checkpoint))
    with CheckpointTensors(checkpoint) as source:
        shapes = {name: source.stored_shape(name) for name in source.names()}
        return {
            name: source.read_part(name, (0,) * len(shape), shape) for name, shape in shapes.items()
        }


def same_stage(left: Path, right: Path) -> None:
    """The same numbers and the same files; the archives' order is the threads'."""
    first, second = numbers(left), numbers(right)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = content(left), content(right)
    assert set(ours) == set(theirs)
    for name in ours:
        if "checkpoints/" not in name and name != DONE:
            assert ours[name] == theirs[name], name
    one, other = read_done(left), read_done(right)
    assert replace(one, checkpoint_digest="") == replace(other, checkpoint_digest="")


def is_stage(folder: Path) -> bool:
    """Whether there is something that could be begun from, exported or averaged."""
    try:
        read_done(folder)
    except HandoffError:
        return False
    return True


def test_import_killed_at_any_moment(run_directory: Path, tmp_path: Path) -> None:
    backbones = run_directory / "backbones"
    words = [f"{name}={backbones / name}" for name in ("vision", "language", "tokenizer")]

    def importing(out: Path) -> Callable[[], int]:
        return lambda: run(hf_import.main, [*OVERRIDES, *words, f"out={out}"])

    other = [*OVERRIDES, *words, f"out={tmp_path / 'seeded'}", "seed=5"]
    count = changes(importing(tmp_path / "counted"), tmp_path / "count")
    assert status(importing(tmp_path / "seeded"), count - 8) == -signal.SIGKILL
    assert not is_stage(tmp_path / "seeded") and run(hf_import.main, other) == 0
    drawn = numbers(tmp_path / "seeded")["image_newline"]
    assert not torch.equal(drawn, numbers(run_directory / "import")["image_newline"])
    for at in moments(count, 10):
        folder = tmp_path / f"at{at}"
        out = folder / "import"
        ended = status(importing(out), at)
        assert ended in (0, -signal.SIGKILL)
        if is_stage(out):
            same_stage(out, run_directory / "import")
        assert importing(out)() == 0
        same_stage(out, run_directory / "import")
        assert no_dots(folder), f"killed at {at} of {count}"
        shutil.rmtree(folder)


def test_import_leaves_others_alone(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither two at once, nor into a stage in training, whose checkpoints it would prune."""
    words = [*OVERRIDES, f"llava={run_directory / 'hf'}", f"out={tmp_path / 'stage1'}"]
    with only_one(tmp_path / ".stage1.import.lock", "this test"):
        assert run(hf_import.main, words) == 1
    assert "another import is writing" in capsys.readouterr().err
    assert not (tmp_path / "stage1").exists()
    for step in (5, 10):
        shutil.copytree(
            step_directory(run_directory / "import", 0), step_directory(tmp_path / "stage1", step)
        )
    before = content(tmp_path)
    assert run(hf_import.main, words) == 1
    assert "holds a training run's checkpoints; choose another out=" in capsys.readouterr().err
    assert content(tmp_path) == before


def no_dots(folder: Path) -> bool:
    """Whether every temporary file and folder is gone; `.metadata` is the checkpoint's index."""
    left = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    return set(left) <= {".metadata"} and not list(folder.rglob("*.tmp"))


@pytest.fixture(scope="module")
def averaged(
    run_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A stage that keeps two checkpoints, and their mean."""
    root = tmp_path_factory.mktemp("averaged")
    stage = root / "stage1"
    source = step_directory(run_directory / "import", 0)
    for step in (1, 2):
        target = step_directory(stage, step)
        shutil.copytree(source, target)
        write_json(target / MANIFEST, {**read_json(target / MANIFEST, "", ""), "step": step})
    digest = digest_and_fsync(step_directory(stage, 2) / MANIFEST)[1]
    done = read_done(run_directory / "import")
    checkpoint = str(step_directory(stage, 2).relative_to(stage))
    write_done(stage, replace(done, checkpoint=checkpoint, checkpoint_digest=digest))
    average_checkpoints.average(stage, 2, root / "mean")
    yield stage, root / "mean"


def test_average_killed_at_any_moment(averaged: tuple[Path, Path], tmp_path: Path) -> None:
    stage, unbroken = averaged

    def averaging(out: Path) -> Callable[[], None]:
        def action() -> None:
            average_checkpoints.average(stage, 2, out)

        return action

    count = changes(averaging(tmp_path / "counted"), tmp_path / "count")
    for at in moments(count, 6):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        out = folder / "mean"
        assert status(averaging(out), at) in (0, -signal.SIGKILL)
        if not out.exists():
            averaging(out)()
            assert [path.name for path in folder.iterdir()] == ["mean"]
        same_stage(out, unbroken)
        assert no_dots(out)
        shutil.rmtree(folder)


def with_limit(action: Callable[[], Any], limit: int, said: Path) -> int:
    """Exit status of `action` where no file may pass `limit` bytes, as where a quota ends."""

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(said, "w") as file, redirect_stderr(file):
            return run(lambda _: action() and None, [])

    return status(limited)


def test_export_without_room_says_where_and_goes_on(
    stage: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    assert with_limit(exporting(stage, tmp_path / "hf"), 30_000, tmp_path / "said") == 1
    said = (tmp_path / "said").read_text()
    assert re.search(r"error: .*/\.hf\.partial could not be written \(.*\); make room", said), said
    assert not (tmp_path / "hf").exists()
    exporting(stage, tmp_path / "hf")()
    assert content(tmp_path / "hf") == unbroken


def test_import_and_average_without_room_say_where(
    run_directory: Path, averaged: tuple[Path, Path], tmp_path: Path
) -> None:
    backbones, said = run_directory / "backbones", tmp_path / "said"
    words = [f"{name}={backbones / name}" for name in ("vision", "language", "tokenizer")]
    out = tmp_path / "import"
    importing = hf_import.main, [*OVERRIDES, *words, f"out={out}"]
    assert with_limit(lambda: importing[0](importing[1]), 50_000, said) == 1
    assert re.search(r"error: .*/import could not be written \(.*\); make room", said.read_text())
    assert not is_stage(out)
    assert run(*importing) == 0
    same_stage(out, run_directory / "import")
    mean = tmp_path / "mean"
    action = lambda: average_checkpoints.average(averaged[0], 2, mean) and None  # noqa: E731
    assert with_limit(action, 50_000, said) == 1
    assert re.search(r"error: .*/\.mean\.partial could not be written", said.read_text())
    assert not mean.exists()
    action()
    same_stage(mean, averaged[1])
    said.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["import", "mean"]


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
