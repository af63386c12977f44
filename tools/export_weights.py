"""A checkpoint's weights to safetensors files, tensor by tensor.

Threads each hold one block of rows. Another follows them with the file's SHA-256 while its bytes
are still in the system's cache, and flushes it while the next file is written. It then writes down
that the file is whole, so that an export which was killed goes on after the last of them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import ModelConfig
from models.hf_state import FUSED_NORMS, Entry, replace_suffix, table
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.files import read_json, write_json
from tools.aside import clear
from tools.safetensors_files import INDEX, SINGLE
from tools.safetensors_stream import SafetensorsWriter, TensorSpec

# Of rows that one thread holds at a time; allocated from glibc's heap, larger ones are mapped anew.
BLOCK_BYTES = 16 << 20
STATE = "export_state.json"  # in the folder aside: what is being written, and what is whole
Rename = Callable[[str], str]


@dataclass(frozen=True)
class WeightFile:
    """One file of the export."""

    name: str
    tensors: tuple[TensorSpec, ...]


def plan_files(
    model: ModelConfig, dtype: torch.dtype, rename: Rename, shard_bytes: int
) -> list[WeightFile]:
    """Tensors in the order of the table, a new file where the next would pass `shard_bytes`."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for entry in table(model):
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            spec = TensorSpec(rename(name), shape, dtype)
            if groups[-1] and filled + spec.size > shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(spec)
            filled += spec.size
    if len(groups) == 1:
        return [WeightFile(SINGLE, tuple(groups[0]))]
    return [
        WeightFile(f"model-{n:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for n, group in enumerate(groups, start=1)
    ]


def index_of(files: Sequence[WeightFile]) -> dict[str, object]:
    """What `model.safetensors.index.json` holds."""
    sizes = [spec.size for file in files for spec in file.tensors]
    names = {spec.name: file.name for file in files for spec in file.tensors}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(names.items()))}


def write_files(
    source: CheckpointTensors,
    model: ModelConfig,
    files: Sequence[WeightFile],
    rename: Rename,
    folder: Path,
    identity: str,
    workers: int,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Mapping[str, str]:
    """Write the files that `folder` does not hold whole yet; returns name -> SHA-256 of all.

    Args:
        identity: of everything that decides the bytes; with another one all is written again.
        check: called before every block; whatever it raises ends the work.

    Raises:
        CheckpointError, ValueError: the checkpoint lacks a tensor, or a number does not fit.
    """
    done = _state(folder, identity, [file.name for file in files])
    behind: Future[None] | None = None

    def finish(name: str, writer: SafetensorsWriter) -> None:
        done[name] = writer.finish()
        write_json(folder / STATE, {"identity": identity, "whole": done})
        say(f"{name} written, {len(done)} of {len(files)}")

    with ThreadPoolExecutor(workers) as copiers, ThreadPoolExecutor(1) as finisher:
        for file in files:
            if file.name in done:
                say(f"{file.name}: whole already")
                continue
            writer = SafetensorsWriter(folder / file.name, file.tensors)
            try:
                ahead = finisher.submit(finish, file.name, writer)
                _fill(source, model, file, rename, writer, copiers, check)
            except BaseException:
                writer.abandon()
                raise
            if behind:
                behind.result()
            behind = ahead
        if behind:
            behind.result()
    if len(files) > 1:
        write_json(folder / INDEX, index_of(files))
    return done


def _state(folder: Path, identity: str, names: Sequence[str]) -> dict[str, str]:
    """Which of the files `names` are whole, and their digests; all else in `folder` is removed."""
    path = folder / STATE
    whole: dict[str, str] = {}
    if path.is_file():
        state = read_json(path, "the state of an export", f"remove {folder}")
        if isinstance(state, dict) and state.get("identity") == identity:
            found = state.get("whole")
            whole = {
                name: str(found[name])
                for name in names
                if isinstance(found, dict) and name in found and (folder / name).is_file()
            }
    clear(folder, keep=[STATE, *whole])
    write_json(path, {"identity": identity, "whole": whole})
    return whole


def _fill(
    source: CheckpointTensors,
    model: ModelConfig,
    file: WeightFile,
    rename: Rename,
    writer: SafetensorsWriter,
    copiers: ThreadPoolExecutor,
    check: Callable[[], None],
) -> None:
    """Write every tensor of a file, in the file's order as far as the checkpoint's allows."""
    wanted = {spec.name: spec.dtype for spec in file.tensors}
    stop = threading.Event()

    def copy(entry: Entry) -> None:
        for name, first_row, rows in blocks(source, entry):
            if stop.is_set():
                return
            check()
            theirs = rename(name)
            if theirs in wanted:
                writer.write(theirs, convert(rows, wanted[theirs], theirs), first_row)

    def place(entry: Entry) -> int:
        return min(writer.place(rename(name)) for name in entry.hf if rename(name) in wanted)

    entries = [entry for entry in table(model) if any(rename(name) in wanted for name in entry.hf)]
    tasks: list[Future[None]] = []
    try:
        for entry in sorted(entries, key=place):
            tasks.append(copiers.submit(copy, entry))
        finished, _ = wait(tasks, return_when=FIRST_EXCEPTION)
    finally:  # whatever happened, Ctrl-C included: nobody writes any more when this is left
        stop.set()
        for task in tasks:
            task.cancel()
        wait(tasks)
    for task in finished:
        task.result()


def blocks(source: CheckpointTensors, entry: Entry) -> Iterator[tuple[str, int, Tensor]]:
    """(HF name, first row, rows) of one Megatron tensor, a bounded piece at a time."""
    name = replace_suffix(entry.megatron, FUSED_NORMS)
    if not source.has(name):
        name = entry.megatron
    if source.shape(name) != entry.shape:
        raise ValueError(
            f"tensor {name} has shape {list(source.shape(name))} in the checkpoint, its DONE.json "
            f"describes {list(entry.shape)}; one of the two is of another model"
        )
    row_bytes = max(torch.Size(entry.shape[1:]).numel() * source.dtype(name).itemsize, 1)
    step = max(BLOCK_BYTES // row_bytes, 1)
    if entry.query_groups:
        yield from _query_groups(source, name, entry, step)
        return
    at = 0
    for theirs, shape in zip(entry.hf, entry.shapes, strict=True):
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            yield theirs, first, source.read(name, at + first, count)
        at += shape[0]


def _query_groups(
    source: CheckpointTensors, name: str, entry: Entry, step: int
) -> Iterator[tuple[str, int, Tensor]]:
    """Some query groups of q, k and v at a time."""
    group_rows = entry.shape[0] // entry.query_groups
    at_once = max(step // group_rows, 1)
    for first in range(0, entry.query_groups, at_once):
        groups = min(at_once, entry.query_groups - first)
        rows = [shape[0] // entry.query_groups for shape in entry.shapes]
        shapes = [(groups * n, *shape[1:]) for n, shape in zip(rows, entry.shapes, strict=True)]
        some = replace(entry, shapes=tuple(shapes), query_groups=groups)
        read = source.read(name, first * group_rows, groups * group_rows)
        for theirs, count, part in zip(entry.hf, rows, some.split(read), strict=True):
            yield theirs, first * count, part


def convert(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`rows` in `dtype`.

    Raises:
        ValueError: a number beyond FP16's range.
    """
    if rows.dtype == dtype:
        return rows
    converted = rows.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).equal(torch.isfinite(rows)):
        raise ValueError(
            f"tensor {name} holds {rows.abs().max().item():.4g}, beyond float16's 65504; use "
            "dtype=bfloat16 or float32"
        )
    return converted
