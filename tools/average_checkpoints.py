"""The mean of a stage's last checkpoints as a stage of its own, ready to export.

    python -m tools.average_checkpoints stage=runs/NAME/stage2 last=3 out=runs/NAME/stage2_mean

Weights are averaged in float64, a block of rows at a time, and rounded once. All checkpoints must
be of this stage and whole; `stage.checkpoint.keep` says how many a run keeps.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import ModelConfig
from data_shards.durable import sync_directory
from models.hf_state import FUSED_NORMS, replace_suffix, table
from pipeline.checkpoint_files import saved_steps, step_directory
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.checkpoint_writer import LazyPart, write_checkpoint
from pipeline.files import digest_and_fsync, saying_where_full
from pipeline.handoff import DONE, read_done, write_done
from pipeline.manifest import MANIFEST, CheckpointError, read_manifest
from tools.aside import clear, filling, must_be_free
from tools.command import required, run, split_arguments
from tools.hf_export import model_of, verify_checkpoint
from tools.import_weights import BLOCK_BYTES

USAGE = "python -m tools.average_checkpoints stage=DIR last=K out=DIR [workers=2]"


def mean_parts(sources: list[CheckpointTensors], names: list[str]) -> list[LazyPart]:
    """Parts of a checkpoint that holds the mean of `sources`' tensors."""

    def reader(name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Callable[[], Tensor]:
        def read() -> Tensor:
            total = torch.zeros(shape, dtype=torch.float64)
            for source in sources:
                total += source.read_part(name, start, shape)
            return (total / len(sources)).to(sources[0].stored_dtype(name))

        return read

    parts = []
    for name in names:
        whole = sources[0].stored_shape(name)
        dtype = sources[0].stored_dtype(name)
        # Megatron looks a stacked tensor's layers up one by one.
        stacked = ".layers." in name and not name.split(".layers.")[1].split(".")[0].isdigit()
        axis = 1 if stacked else 0
        row_bytes = 8 * torch.Size(whole[axis + 1 :]).numel()
        step = max(BLOCK_BYTES // row_bytes, 1)
        for layer in range(whole[0]) if stacked else [0]:
            for first in range(0, whole[axis], step):
                count = min(step, whole[axis] - first)
                lead = ((layer,), (1,)) if stacked else ((), ())
                start = (*lead[0], first, *([0] * (len(whole) - axis - 1)))
                shape = (*lead[1], count, *whole[axis + 1 :])
                parts.append(LazyPart(name, whole, start, shape, dtype, reader(name, start, shape)))
    return parts


def stored_names(source: CheckpointTensors, model: ModelConfig) -> list[str]:
    """The model's tensors as the checkpoint calls them.

    Raises:
        CheckpointError: one is not there.
    """
    names = set()
    for entry in table(model):
        fused = replace_suffix(entry.megatron, FUSED_NORMS)
        names.add(source.find(fused if source.has(fused) else entry.megatron)[0])
    return sorted(names)


def shapes(
    source: CheckpointTensors, names: list[str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of tensors by their names in the checkpoint."""
    return {name: (source.stored_shape(name), source.stored_dtype(name)) for name in names}


def average(stage: Path, last: int, out: Path, workers: int = 2) -> Path:
    """Write `out`, a finished stage with the mean weights; returns its checkpoint.

    It is written aside and renamed; after a kill the same command begins anew.

    Raises:
        ValueError: too few checkpoints, a damaged one, `out` exists.
    """
    must_be_free(out)
    done = read_done(stage)
    steps = saved_steps(stage)[-last:]
    if len(steps) < last:
        raise ValueError(
            f"{stage} keeps {len(steps)} checkpoints, not {last}; keep more with "
            "stage.checkpoint.keep, or average fewer"
        )
    folders = [step_directory(stage, step) for step in steps]
    for folder in folders:
        verify_checkpoint(folder, workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.partial")
    with ExitStack() as opened:
        opened.enter_context(filling(aside))
        opened.enter_context(saying_where_full(aside, "make room and run the same command again"))
        must_be_free(out)  # whoever was writing may have ended meanwhile
        clear(aside)
        sources = [opened.enter_context(CheckpointTensors(folder)) for folder in folders]
        names = [stored_names(source, model_of(done, stage)) for source in sources]
        for folder, source, theirs in zip(folders, sources, names, strict=True):
            if shapes(source, theirs) != shapes(sources[0], names[0]):
                raise CheckpointError(
                    f"{folder} holds other tensors than {folders[0].name}; average fewer, or "
                    "remove the one that is not of this run"
                )
        manifest = replace(read_manifest(folders[-1]), files={})
        checkpoint = write_checkpoint(mean_parts(sources, names[0]), aside, manifest, workers)
        digest = digest_and_fsync(checkpoint / MANIFEST)[1]
        relative = checkpoint.relative_to(aside)
        write_done(aside, replace(done, checkpoint=str(relative), checkpoint_digest=digest))
        sync_directory(aside)
        aside.rename(out)
        sync_directory(out.parent)
    return out / relative


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("stage", "last", "out", "workers"))
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; usage: {USAGE}")
    for word, least in (("last", 2), ("workers", 1)):
        value = ours.get(word, "2")
        if not value.isdigit() or int(value) < least:
            raise ValueError(f"{word}={value} is not a whole number of at least {least}")
    stage, out = required(ours, "stage", USAGE), required(ours, "out", USAGE)
    last = int(ours.get("last") or 2)
    checkpoint = average(stage, last, out, int(ours.get("workers") or 2))
    print(f"mean of the last {last} checkpoints of {stage}: {checkpoint} ({out / DONE})")


if __name__ == "__main__":
    sys.exit(run(main))
