"""Folders of checkpoints: named, filled aside, committed by all ranks together, pruned.

A checkpoint exists when its folder `checkpoints/step_NNNNNNNN/` carries a MANIFEST.json. It is
written into a dot-folder whose name no other start of the ranks uses; the manifest is the last
file in it, and the rename comes after that.
"""

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data_shards.durable import sync_directory
from pipeline.files import digest_and_fsync
from pipeline.manifest import MANIFEST, Manifest, write_manifest

CHECKPOINTS = "checkpoints"
Digests = dict[str, tuple[int, str]]  # file name -> bytes, SHA-256


def step_directory(stage_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return stage_dir / CHECKPOINTS / f"step_{step:08d}"


def saved_steps(stage_dir: Path) -> list[int]:
    """Steps whose folder carries a manifest, oldest first; nothing is verified yet."""
    found = []
    for directory in (stage_dir / CHECKPOINTS).glob("step_*"):
        if (directory / MANIFEST).is_file() and directory.name[5:].isdigit():
            found.append(int(directory.name[5:]))
    return sorted(found)


def prune(stage_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, manifest first."""
    for step in saved_steps(stage_dir)[:-keep]:
        directory = step_directory(stage_dir, step)
        (directory / MANIFEST).unlink()
        shutil.rmtree(directory)


@dataclass(frozen=True)
class Place:
    """Where one checkpoint is written, and where it goes once it is whole."""

    stage_dir: Path
    step: int
    aside: Path

    @property
    def final(self) -> Path:
        """The folder's name once its manifest is in it."""
        return step_directory(self.stage_dir, self.step)

    def failure(self, cause: str) -> OSError:
        """What a save that could not be written raises, on every rank."""
        return OSError(
            f"{self.final} could not be written ({cause}); make room or give permission and run "
            "the same command: it resumes from the checkpoint before"
        )


def last_line(error: BaseException) -> str:
    """Megatron's writers run in processes of their own; the cause is in the last line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def open_aside(stage_dir: Path, step: int) -> Place:
    """An empty folder for a new checkpoint; all ranks call it.

    What other saves left unfinished is removed. A helper process that outlived its rank may still
    write there, so the name holds the process and the time.

    Raises:
        OSError: on every rank.
    """
    name, problem = "", ""
    if dist.get_rank() == 0:
        folder = stage_dir / CHECKPOINTS
        name = f".step_{step:08d}.{os.getpid()}-{time.time_ns()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            (folder / name).mkdir()
        except OSError as error:
            problem = last_line(error)
    answer = [name, problem]
    dist.broadcast_object_list(answer, src=0)
    place = Place(stage_dir, step, stage_dir / CHECKPOINTS / answer[0])
    if answer[1]:
        raise place.failure(answer[1])
    return place


def spread_digests(directory: Path) -> Digests:
    """Digest every file of a new checkpoint, each rank its share, and make them durable."""
    names = sorted(p.name for p in directory.iterdir())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    gathered: list[Digests | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: digest_and_fsync(directory / name) for name in mine})
    return {name: entry for part in gathered if part for name, entry in part.items()}


def commit(place: Place, manifest: Manifest, keep: int) -> None:
    """Make the files of `place.aside` a checkpoint; all ranks call it when all have written.

    `manifest.files` may lack small files, which rank 0 digests.

    Raises:
        OSError: on every rank; nothing has changed but the folder aside, which is gone.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            _commit(place, manifest, keep)
        except OSError as error:
            problem = [last_line(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        discard(place)
        raise place.failure(problem[0])


def _commit(place: Place, manifest: Manifest, keep: int) -> None:
    files = dict(manifest.files)
    for path in sorted(place.aside.iterdir()):
        if path.name not in files:
            files[path.name] = digest_and_fsync(path)
    write_manifest(place.aside, _with_files(manifest, files))
    sync_directory(place.aside)
    if place.final.exists():  # a damaged checkpoint of the same step that resuming passed over
        shutil.rmtree(place.final)
    place.aside.rename(place.final)
    sync_directory(place.final.parent)
    prune(place.stage_dir, keep)


def _with_files(manifest: Manifest, files: Mapping[str, tuple[int, str]]) -> Manifest:
    return Manifest(**{**vars(manifest), "files": dict(files)})


def discard(place: Place) -> None:
    """Remove what a failed save has written; every rank may call it."""
    shutil.rmtree(place.aside, ignore_errors=True)
