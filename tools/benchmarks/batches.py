"""Micro-batches as a file: what the GPU scripts train on, needing NumPy alone to read."""

import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from data_shards.batch import PackedBatch
from data_shards.durable import replacing

Steps = list[list[PackedBatch]]
# Stored as narrow as they fit; `PackedBatch` has them as int64.
_NARROW = ("tokens_T", "labels_T", "position_ids_T", "image_positions_P", "image_rows_P")


def write_batches(path: Path, steps: Sequence[Sequence[PackedBatch]]) -> None:
    """`path` (.npz, compressed), written aside and renamed; entries are `step/micro/field`."""
    arrays: dict[str, np.ndarray] = {}
    for step, micro_batches in enumerate(steps):
        for micro, batch in enumerate(micro_batches):
            for field in fields(batch):
                value = np.asarray(getattr(batch, field.name))
                if field.name in _NARROW:
                    value = value.astype(np.int32)
                arrays[f"{step}/{micro}/{field.name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_batches(path: Path, most_steps: int | None = None) -> Steps:
    """The first `most_steps` steps of a file that `write_batches` wrote.

    Raises:
        ValueError: it is missing, damaged or something else; names the remedy.
    """
    steps: Steps = []
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = sorted({tuple(map(int, name.split("/")[:2])) for name in stored.files})
            for step, micro in names:
                if most_steps is not None and step >= most_steps:
                    break
                values = {f.name: stored[f"{step}/{micro}/{f.name}"] for f in fields(PackedBatch)}
                for name in _NARROW:
                    values[name] = values[name].astype(np.int64)
                for name in ("n_images", "n_masked"):
                    values[name] = int(values[name])
                if step == len(steps):
                    steps.append([])
                steps[step].append(PackedBatch(**values))
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} does not hold packed batches ({error}); make it with python -m "
            f"tools.benchmarks.demo_batches out={path}"
        ) from None
    if not steps:
        raise ValueError(f"{path} holds no batches; make it again")
    return steps
