"""What tests of kills compare and how often they kill."""

import random
import resource
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.handoff import read_done
from pipeline.manifest import read_manifest, verify_files
from tests.tools.dying import status
from tools.command import run


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


def numbers(stage: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's checkpoint, whose files are verified first."""
    checkpoint = stage / read_done(stage).checkpoint
    verify_files(checkpoint, read_manifest(checkpoint))
    with CheckpointTensors(checkpoint) as source:
        shapes = {name: source.stored_shape(name) for name in source.names()}
        return {
            name: source.read_part(name, (0,) * len(shape), shape) for name, shape in shapes.items()
        }


def with_limit(action: Callable[[], Any], limit: int, said: Path) -> int:
    """Exit status of `action` where no file may pass `limit` bytes, as where a quota ends."""

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(said, "w") as file, redirect_stderr(file):
            return run(lambda _: action() and None, [])

    return status(limited)
