"""Tokens a second, MFU and memory of the real layers; a pass of stage 3 against one of stage 2.

Every module trains. FLOPs are those of models/flops.py: what the model needs, whatever the machine
does to spare memory; MFU is of the dense BF16 peak in FP8 too, so that FP8's gain shows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch

from conf.schema import ParallelConfig, PrecisionConfig
from data_shards.batch import PackedBatch
from models.flops import forward_flops, training_flops
from pipeline.objectives.base import Objective
from pipeline.objectives.preference import PreferenceObjective
from tools.benchmarks.gpu.context import Context
from tools.benchmarks.gpu.report import Report, Stopwatch, Table
from tools.benchmarks.gpu.shapes import h200, speed_parallel
from tools.benchmarks.synthetic import packed_row
from tools.benchmarks.training import Job, build_job, training_config

PEAK = 989e12  # dense BF16 FLOP/s of an H100 or H200 SXM (NVIDIA's data sheet)
ALL = {"vision", "connector", "language"}


@dataclass(frozen=True)
class Work:
    """What one row holds."""

    tokens: int  # real ones
    tiles: int
    targets: int
    flops: float  # of training every module


def work_of(context: Context, batch: PackedBatch) -> Work:
    """Counted by models/flops.py; tokens of padding documents are left out."""
    lengths = np.diff(batch.cu_seqlens)
    real = [
        int(np.count_nonzero(batch.tokens_T[start : start + length]))
        for start, length in zip(batch.cu_seqlens[:-1], lengths, strict=True)
    ]
    tiles = len(batch.tiles_NCHW) if batch.n_images else 0
    targets = int(batch.loss_mask_T.sum())
    forward = forward_flops(context.shapes.speed, real, targets, tiles)
    return Work(sum(real), tiles, targets, training_flops(forward, ALL).total)


def _build(context: Context, precision: PrecisionConfig, parallel: ParallelConfig) -> Job:
    torch.manual_seed(0)
    shapes = context.shapes
    config = training_config(shapes.speed, parallel, precision, max(shapes.lengths))
    return build_job(config, context.device)


def seconds_of_a_step(
    context: Context, job: Job, batch: PackedBatch, objective: Objective | None
) -> float:
    """Median of the timed steps: forward, backward, optimizer."""
    seconds = []
    for number in range(context.shapes.warm_up + context.shapes.timed):
        context.synchronize()
        watch = Stopwatch()
        job.step([batch], objective)
        context.synchronize()
        if number >= context.shapes.warm_up:
            seconds.append(watch())
        if context.left() < 5 and seconds:
            break
    return median(seconds)


def _recompute_everything(job: Job) -> None:
    """Switched on where a row does not fit: Megatron reads it at every pass."""
    for module in job.network.language_model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.recompute_granularity = "full"
            config.recompute_method, config.recompute_num_layers = "uniform", 1


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def step_or_recompute(
    context: Context, job: Job, batch: PackedBatch, note: Callable[[str], None]
) -> tuple[float, bool]:
    """Seconds of a step, and whether it fits only with every decoder layer recomputed."""
    try:
        return seconds_of_a_step(context, job, batch, None), False
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
    # Outside the handler, whose traceback would hold on to the activations.
    note("out of memory; every decoder layer is recomputed")
    _recompute_everything(job)
    context.free()
    return seconds_of_a_step(context, job, batch, None), True


class _Tables:
    """The three tables, filled by one precision after the other."""

    def __init__(self, context: Context, report: Report) -> None:
        self.context, self.report, shapes = context, report, context.shapes
        model = shapes.speed
        columns = ["precision", "row", "tiles", "s/step", "tokens/s", "TFLOP/s", "MFU of 989"]
        self.speed = report.table(
            f"Speed of {model.name}: {model.text.layers} decoder layers, the whole vision tower",
            [*columns, "of the first", "peak GiB", "recomputed"],
        )
        self.memory = report.table(
            "Memory of one GPU, GiB", ["row", "part", "measured", "planned", "measured/planned"]
        )
        self.stage3 = report.table(
            "Stage 3 against stage 2, same row", ["pass", "s/step", "tokens/s", "ratio"]
        )
        self.rows = {n: packed_row(shapes.speed, n, shapes.mixture, 0) for n in shapes.lengths}
        self.first: dict[int, float] = {}
        report.data["rows"] = {
            str(n): {"documents": np.diff(row.cu_seqlens).tolist(), **asdict(work_of(context, row))}
            for n, row in self.rows.items()
        }

    def precision(self, name: str, precision: PrecisionConfig, parallel: ParallelConfig) -> None:
        """All lengths in one precision, and stage 3 in the first."""
        context, report = self.context, self.report
        before = context.allocated()
        job = _build(context, precision, parallel)
        recomputed = False
        for length, batch in self.rows.items():
            if context.left() < 8:
                report.note(f"{name}, {length}: no time was left")
                return
            context.free()
            note = partial(self._note, f"{name}, {length}")
            seconds, late = step_or_recompute(context, job, batch, note)
            recomputed |= late
            self._speed_row(name, length, seconds, recomputed)
            if not recomputed:
                peak = torch.cuda.max_memory_allocated() if context.cuda else 0
                held = _held(job, context.allocated() - before, peak - before)
                planned = _planned(context, parallel, precision, work_of(context, batch), batch)
                self._memory_rows(f"{name}, {length}", held, planned)
        if name == next(iter(context.precisions)):
            report.attempt("stage 3", lambda: _stage3(context, report, self.stage3, job))

    def _note(self, what: str, text: str) -> None:
        self.report.note(f"{what}: {text}")

    def _speed_row(self, name: str, length: int, seconds: float, recomputed: bool) -> None:
        context, work = self.context, work_of(self.context, self.rows[length])
        rate = work.flops / seconds
        self.report.row(
            self.speed,
            name,
            length,
            work.tiles,
            seconds,
            work.tokens / seconds,
            rate / 1e12,
            rate / PEAK if context.cuda else "no GPU",
            rate / self.first.setdefault(length, rate),
            torch.cuda.max_memory_allocated() / 2**30 if context.cuda else None,
            "every layer" if recomputed else "",
        )

    def _memory_rows(self, row: str, held: dict[str, float], planned: dict[str, float]) -> None:
        for part, expected in planned.items():
            known = self.context.cuda or part in ("weights", "gradients")
            found = held[part] if known else None
            gib = None if found is None else found / 2**30
            ratio = None if found is None or not expected else found / expected
            self.report.row(self.memory, row, part, gib, expected / 2**30, ratio)


def run(context: Context, report: Report) -> None:
    """One row a precision and length; memory beside the plan; then stage 3."""
    tables = _Tables(context, report)
    wanted = speed_parallel(context.shapes, context.cuda)
    for name, precision in context.precisions.items():
        if context.left() < 15 and tables.speed.rows:
            report.note(f"{name}: no time was left")
            continue
        known = len(tables.speed.rows)
        for states in dict.fromkeys((wanted.optimizer_states, "fp32")):
            parallel = replace(wanted, optimizer_states=states)
            report.attempt(
                f"{name}, optimizer states in {states}",
                partial(tables.precision, name, precision, parallel),
            )
            context.free()
            if len(tables.speed.rows) > known:
                break


def _held(job: Job, allocated: int, peak: int) -> dict[str, float]:
    """Bytes by part. What is kept beside weights and gradients is the optimizer's state, with FP8
    also the weights' copies."""
    weights = sum(p.numel() * p.element_size() for p in job.network.parameters())
    gradients = sum(
        buffer.grad_data.numel() * buffer.grad_data.element_size()
        for model in job.models
        for buffer in model.buffers
    )
    return {
        "weights": float(weights),
        "gradients": float(gradients),
        "optimizer": float(allocated - weights - gradients),
        "activations": float(peak - allocated),
        "all": float(peak),
    }


def _planned(
    context: Context,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    work: Work,
    batch: PackedBatch,
) -> dict[str, float]:
    """The planner's bytes, under the names of `_held`."""
    from tools.plan.job import job_of
    from tools.plan.memory import stage_memory
    from tools.plan.workload import Row

    length, documents = len(batch.tokens_T), np.diff(batch.cu_seqlens).astype(float)
    config = training_config(context.shapes.speed, parallel, precision, length)
    config.cluster = h200()
    row = Row(
        tokens=length,
        real=work.tokens,
        document=float((documents**2).sum() / documents.sum()),
        targets=work.targets,
        tiles=work.tiles,
        most_tiles=work.tiles,
        source="the measured row",
    )
    planned = stage_memory(job_of(config, row), 0)
    moving = planned.activations + planned.logits + planned.vision + planned.working
    held = {
        "weights": planned.weights,
        "gradients": planned.gradients,
        "optimizer": planned.optimizer,
        "activations": moving,
    }
    return {**held, "all": sum(held.values())}


def _stage3(context: Context, report: Report, table: Table, job: Job) -> None:
    """DPO and the supervised loss on the very same row of pairs."""
    shapes = context.shapes
    pairs = replace(shapes.mixture, pairs=True)
    batch = packed_row(shapes.speed, shapes.pairs_length, pairs, seed=0)
    reference = {(int(a), int(b)): (0.0, 0.0) for a, b in batch.sample_ids}
    work = work_of(context, batch)
    first = 0.0
    for name, objective in (
        ("stage 2's loss", None),
        ("stage 3's (DPO), reference looked up", PreferenceObjective(0.1, reference)),
    ):
        seconds = seconds_of_a_step(context, job, batch, objective)
        rate = work.tokens / seconds
        first = first or rate
        report.row(table, name, seconds, rate, rate / first)
