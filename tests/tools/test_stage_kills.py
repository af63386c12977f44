"""Killed or out of room, import and averaging leave nothing that looks done, and run again."""

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint_files import step_directory
from pipeline.files import digest_and_fsync, read_json, write_json
from pipeline.handoff import DONE, HandoffError, read_done, write_done
from pipeline.manifest import MANIFEST
from tests.tools.dying import changes, status
from tests.tools.kills import content, moments, numbers, with_limit
from tests.tools.small_backbones import OVERRIDES
from tools import average_checkpoints, hf_import
from tools.aside import only_one
from tools.command import run


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
