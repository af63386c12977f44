"""Damage to a checkpoint's files is found and named before anything is parsed."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import digest_and_fsync
from pipeline.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from pipeline.safe_pickle import check_metadata


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in ("__0_0.distcp", "common.pt"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    files = {p.name: digest_and_fsync(p) for p in tmp_path.iterdir()}
    write_manifest(tmp_path, Manifest(7, 99, "plan", "config", {"world_size": 1}, "abc", files))
    return tmp_path


def test_good(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.samples, manifest.layout) == (7, 99, {"world_size": 1})
    verify_files(checkpoint, manifest)


def _flip(directory: Path) -> None:
    data = bytearray((directory / "common.pt").read_bytes())
    data[500] ^= 1
    (directory / "common.pt").write_bytes(data)


def _truncate(directory: Path) -> None:
    (directory / "common.pt").write_bytes((directory / "common.pt").read_bytes()[:-1])


def _remove(directory: Path) -> None:
    (directory / "common.pt").unlink()


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove])
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        verify_files(checkpoint, read_manifest(checkpoint))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "null"])
def test_damaged_manifest(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json"):
        read_manifest(checkpoint)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not complete"):
        read_manifest(tmp_path)


def test_path_outside_the_folder(checkpoint: Path) -> None:
    value = json.loads((checkpoint / MANIFEST).read_text())
    value["files"]["../../etc/passwd"] = [1, "x"]
    (checkpoint / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="outside its folder"):
        verify_files(checkpoint, read_manifest(checkpoint))


def test_foreign_pickle_is_not_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            import os

            return (os.system, (f"touch {victim}",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"\.metadata is not a checkpoint index .*system"):
        check_metadata(tmp_path)
    assert not victim.exists()


# The last two name a length that no memory holds.
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"garbage",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + b"\x10" * 8,
    ],
)
def test_damaged_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        check_metadata(tmp_path)
