"""Save, go on, load into a new job, go on: the same losses; FP8's amax history comes back."""

import importlib.util
import shutil
from functools import partial
from typing import Any

import torch

from conf.schema import ParallelConfig, PrecisionConfig
from data_shards.batch import PackedBatch
from pipeline import checkpoint
from tools.benchmarks.gpu.context import Context
from tools.benchmarks.gpu.report import Report, Stopwatch
from tools.benchmarks.synthetic import Mixture, packed_row
from tools.benchmarks.training import Job, build_job, training_config

BEFORE, AFTER, LENGTH = 4, 3, 256


def _job(context: Context, precision: PrecisionConfig) -> Job:
    parallel = ParallelConfig(distributed_optimizer=True)
    config = training_config(context.shapes.resume, parallel, precision, LENGTH)
    return build_job(config, context.device)


def _state(job: Job) -> checkpoint.TrainingState:
    layout = {"world_size": 1, "tensor": 1, "pipeline": 1, "context": 1}
    return checkpoint.TrainingState(
        models=[job.network],
        optimizer=job.optimizer,
        schedule=job.schedule,
        layout=layout,
        plan_digest="benchmark",
        config_digest="benchmark",
        code_version="benchmark",
        step=BEFORE,
    )


def amax_histories(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of every module that keeps one (the `delayed` recipe), copied."""
    found = {}
    for name, module in model.named_modules():
        meta: dict[str, Any] = getattr(module, "fp8_meta", {})
        for key in ("scaling_fwd", "scaling_bwd"):
            history = getattr(meta.get(key), "amax_history", None)
            if history is not None and history.numel():
                found[f"{name}.{key}"] = history.detach().clone().cpu()
    return found


def _do_without_psutil() -> None:
    """Megatron's checkpoint writers log their size by psutil; where it is missing they die and
    are waited for without end. A bare machine may lack it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if importlib.util.find_spec("psutil") is None:
        filesystem_async._process_memory = lambda: 0  # inherited by the writers, which are forked


def run(context: Context, report: Report) -> None:
    """One row a precision."""
    _do_without_psutil()
    table = report.table(
        "Resume",
        [
            "precision",
            "losses after",
            "difference",
            "same",
            "amax histories",
            "save s",
            "GB",
        ],
    )
    model = context.shapes.resume
    mixture = Mixture(images=((32, 32), (64, 40)), text=20, documents=(60, 25))
    rows: list[list[PackedBatch]] = [
        [packed_row(model, LENGTH, mixture, seed)] for seed in range(BEFORE + AFTER)
    ]

    def one(name: str, precision: PrecisionConfig) -> None:
        directory = context.out / f"resume_{name}"
        shutil.rmtree(directory, ignore_errors=True)
        try:
            torch.manual_seed(0)
            first = _job(context, precision)
            for step in range(BEFORE):
                first.step(rows[step])
            saved_history, watch = amax_histories(first.network), Stopwatch()
            folder = checkpoint.save(_state(first), directory, keep=1)
            seconds = watch()
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            went_on = [first.step(rows[BEFORE + step])["loss"] for step in range(AFTER)]
            del first
            context.free()
            torch.manual_seed(1)  # other weights, to be overwritten
            second = _job(context, precision)
            checkpoint.load(_state(second), folder, checkpoint.verify(folder))
            histories = amax_histories(second.network)
            resumed = [second.step(rows[BEFORE + step])["loss"] for step in range(AFTER)]
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        largest = max(abs(a - b) for a, b in zip(went_on, resumed, strict=True))
        if not saved_history:
            history = "none kept"
        elif saved_history.keys() == histories.keys() and all(
            torch.equal(saved_history[key], histories[key]) for key in histories
        ):
            history = f"{len(histories)}, equal"
        else:
            history = f"{len(saved_history)} saved, {len(histories)} loaded, DIFFERENT"
        same = "bit for bit" if largest == 0 else ("nearly" if largest < 1e-3 else "NO")
        shown = " ".join(f"{loss:.4f}" for loss in went_on)
        report.data[name] = {"went_on": went_on, "resumed": resumed}
        report.row(table, name, shown, largest, same, history, seconds, size / 1e9)

    for name, precision in context.precisions.items():
        if context.left() < 10 and table.rows:
            report.note(f"{name}: no time was left")
            continue
        report.attempt(name, partial(one, name, precision))
        context.free()
