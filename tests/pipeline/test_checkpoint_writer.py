"""A checkpoint of weights alone is whole, or is not there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.checkpoint_writer import LazyPart, write_checkpoint
from pipeline.files import write_json
from pipeline.manifest import Manifest, read_manifest, verify_files

MANIFEST = Manifest(0, 0, "p", "c", {"world_size": 1}, "v", {})


def parts(count: int = 6) -> list[LazyPart]:
    """Tensors of different sizes, half of them in two parts."""
    found = []
    for n in range(count):
        whole, halves = (4 * (n + 1), 8), 1 + n % 2
        rows = whole[0] // halves
        for half in range(halves):

            def read(n: int = n, rows: int = rows) -> Tensor:
                return torch.full((rows, 8), float(n))

            start = (half * rows, 0)
            found.append(LazyPart(f"t{n}", whole, start, (rows, 8), torch.float32, read))
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_all_parts_are_there(tmp_path: Path, workers: int) -> None:
    (tmp_path / "checkpoints/.step_00000009.1-1.tmp").mkdir(parents=True)  # of a kill
    written = write_checkpoint(parts(), tmp_path, MANIFEST, workers)
    verify_files(written, read_manifest(written))
    with CheckpointTensors(written) as source:
        for n in range(6):
            assert torch.equal(source.read(f"t{n}"), torch.full((4 * (n + 1), 8), float(n)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000000"]


def raising(error: BaseException) -> Callable[[], Tensor]:
    def read() -> Tensor:
        raise error

    return read


@pytest.mark.parametrize("error", [ValueError("cut"), OSError("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("workers", [1, 3])
def test_part_that_fails_in_any_thread_is_not_forgotten(
    tmp_path: Path, workers: int, error: BaseException
) -> None:
    for bad in range(len(parts())):
        spoiled = parts()
        spoiled[bad] = replace(spoiled[bad], read=raising(error))
        with pytest.raises(type(error)) as caught:
            write_checkpoint(spoiled, tmp_path, MANIFEST, workers)
        assert caught.value is error
        assert not list((tmp_path / "checkpoints").iterdir())


def test_checkpoint_before_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    before = write_checkpoint(parts(), tmp_path, MANIFEST, 2)
    write_json(tmp_path / "mine.json", {})
    spoiled = [replace(part, read=raising(ValueError("cut"))) for part in parts()]
    with pytest.raises(ValueError, match="cut"):
        write_checkpoint(spoiled, tmp_path, replace(MANIFEST, step=1), 2)
    verify_files(before, read_manifest(before))
    after = write_checkpoint(parts(), tmp_path, replace(MANIFEST, step=1), 2)
    assert after.is_dir() and not before.exists()
