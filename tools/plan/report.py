"""A prediction as text for a terminal and as plain values for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from conf.schema import Config
from tools.plan.memory import GIB, HEADROOM
from tools.plan.predict import Prediction
from tools.plan.workload import row_samples

WIDTH = 100
DIFFERS = 0.25  # of the recipe's GPU-hours: worth a word


def layout(config: Config) -> str:
    """`tp4 pp2x3 cp1 dp8`."""
    parallel = config.parallel
    virtual = f"x{parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
    return (
        f"tp{parallel.tensor} pp{parallel.pipeline}{virtual} cp{parallel.context} dp{parallel.data}"
    )


def recompute(config: Config) -> str:
    """`none`, `full`, `full (10 layers)` or the recomputed modules."""
    parallel = config.parallel
    if parallel.recompute == "selective":
        return ",".join(parallel.recompute_modules)
    if parallel.recompute == "full" and parallel.recompute_layers is not None:
        return f"full ({_count(parallel.recompute_layers, 'layer')})"
    return parallel.recompute


def precision(config: Config) -> str:
    recipe = config.precision.fp8_recipe
    return f"fp8 {recipe}" if recipe else config.precision.params


def stage_lines(found: Prediction) -> list[str]:
    """All about one stage."""
    config, fit, step, cost = found.config, found.fit, found.step, found.cost
    cluster, stage = config.cluster, config.stage
    memory = {k: v / GIB for k, v in dataclasses.asdict(fit.memory).items()}
    parts = "  ".join(f"{name} {size:.1f}" for name, size in memory.items() if size >= 0.05)
    verdict = "fits" if fit.fits else "DOES NOT FIT"
    of = f"{fit.memory.total / GIB:.1f} of {fit.usable / GIB:.1f} GiB"
    per_step = (
        f"{stage.global_batch_size} packs of {stage.sequence_length} a step, "
        f"{_count(found.job.micro_batches, 'micro-batch')} of a replica{_passes(found)}"
    )
    lines = [
        f"{stage.name}: {config.model.name}, {config.parallel.world_size} x "
        f"{cluster.gpu or 'GPU'} ({cluster.name})",
        f"  layout   {layout(config)}, {precision(config)}, recomputed: {recompute(config)}",
        *_wrapped("  data     ", found.row.source, " "),
        f"           {per_step}",
        f"  memory   {of} ({fit.share:.0%}, {HEADROOM:.0%} kept free), pipeline stage "
        f"{fit.stage}: {verdict}",
        *_wrapped("           ", parts, "  "),
        *_wrapped("  step     ", f"{step.seconds:.2f} s = {_times(found)}", " "),
        f"  speed    {step.tokens_per_gpu:,.0f} tokens/s/GPU, {step.tflops_per_gpu:,.0f} "
        f"TFLOP/s/GPU, MFU {found.mfu:.0%}",
        f"  cost     {cost.steps:,} steps, {cost.hours:,.1f} h, {cost.gpu_hours:,.0f} GPU-hours"
        + _walltime(found),
        f"  disk     {cost.disk.checkpoint / 1e9:,.1f} GB a checkpoint in at most "
        f"{cost.disk.files} files, {cost.disk.total / 1e9:,.0f} GB for {cost.disk.checkpoints}",
        f"  submit   {stage.name}:stage.gpu_hours={_rounded(cost.submit_gpu_hours)}"
        + _recipe(found),
    ]
    return lines


def _wrapped(head: str, text: str, between: str) -> list[str]:
    """Lines of at most WIDTH columns, `head` before the first, blanks before the others."""
    lines, line = [], head
    for word in text.split(between):
        if len(line) + len(word) > WIDTH:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += f"{word}{between}"
    return [*lines, line.rstrip()]


def _passes(found: Prediction) -> str:
    """How often the stage sees each sample, where their number is known."""
    samples = row_samples(found.config)
    if not samples:
        return ""
    seen = found.cost.steps * found.config.stage.global_batch_size * found.row.samples
    assumed = "an assumed " if found.row.source.startswith("assumed") else ""
    return f"; {seen / samples:.2g} x {assumed}{samples:,.0f} samples"


def _times(found: Prediction) -> str:
    step = found.step
    parts = {
        "products": step.compute.products,
        "attention": step.compute.attention,
        "element-wise": step.compute.traffic,
        "TP": step.compute.tensor,
        "CP": step.compute.context,
        "recompute": step.recompute,
        "bubble": step.bubble,
        "sends": step.pipeline,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "other": step.other,
    }
    share = step.seconds * 0.005
    return " + ".join(f"{name} {part:.2f}" for name, part in parts.items() if part >= share)


def _walltime(found: Prediction) -> str:
    cluster, cost = found.config.cluster, found.cost
    if cluster.executor == "local" or cluster.hours == float("inf"):
        return ""
    segments = cost.segments
    measured = " (measured in this run)" if segments.measured else ""
    return (
        f"; {_count(segments.segments, 'segment')} of {cluster.hours:g} h{measured} "
        f"+ {cluster.spare_segments} spare"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 'es' if what.endswith('ch') else 's'}"


def _rounded(hours: float) -> str:
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def _recipe(found: Prediction) -> str:
    recipe, ours = found.cost.recipe_gpu_hours, found.cost.gpu_hours
    if not recipe:
        return ""
    change = ours / recipe - 1
    if abs(change) < DIFFERS:
        return f"   (the recipe's {found.config.stage.gpu_hours:g} is within {DIFFERS:.0%})"
    return (
        f"   (the recipe says {found.config.stage.gpu_hours:g}: "
        f"{abs(change):.0%} {'more' if change > 0 else 'less'} is predicted)"
    )


def table(found: Sequence[Prediction], chosen: Prediction) -> list[str]:
    """Alternatives, best first; the chosen one is marked, and added if it is not among them."""
    rows = list(found)
    if not any(_same(row, chosen) for row in rows):
        rows.append(chosen)
    head = (
        "",
        "layout",
        "packs",
        "precision",
        "recomputed",
        "GiB",
        "s",
        "tokens/s/GPU",
        "GPU-hours",
    )
    cells = [head, *(_cells(row, _same(row, chosen)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    numbers = range(5, len(head))
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _cells(row: Prediction, chosen: bool) -> tuple[str, ...]:
    return (
        ("*" if row.fit.fits else "!") if chosen else "",
        layout(row.config),
        str(row.config.stage.micro_batch_size),
        precision(row.config),
        recompute(row.config),
        f"{row.fit.memory.total / GIB:.1f}",
        f"{row.step.seconds:.2f}",
        f"{row.step.tokens_per_gpu:,.0f}",
        f"{row.cost.gpu_hours:,.0f}",
    )


def _same(one: Prediction, other: Prediction) -> bool:
    return (
        layout(one.config) == layout(other.config)
        and recompute(one.config) == recompute(other.config)
        and one.config.precision == other.config.precision
        and one.config.stage.micro_batch_size == other.config.stage.micro_batch_size
    )


def values(found: Prediction) -> dict[str, Any]:
    """Plain values; bytes and seconds."""
    config, step, cost = found.config, found.step, found.cost
    return {
        "stage": config.stage.name,
        "cluster": config.cluster.name,
        "gpus": config.parallel.world_size,
        "layout": layout(config),
        "parallel": dataclasses.asdict(config.parallel),
        "precision": dataclasses.asdict(config.precision),
        "micro_batch_size": config.stage.micro_batch_size,
        "row": dataclasses.asdict(found.row),
        "memory_bytes": dataclasses.asdict(found.fit.memory),
        "memory_total_bytes": found.fit.memory.total,
        "memory_usable_bytes": found.fit.usable,
        "fullest_pipeline_stage": found.fit.stage,
        "fits": found.fit.fits,
        "step_seconds": step.seconds,
        "seconds": {
            **dataclasses.asdict(step.compute),
            "recompute": step.recompute,
            "bubble": step.bubble,
            "pipeline": step.pipeline,
            "gradients": step.gradients,
            "optimizer": step.optimizer,
            "other": step.other,
        },
        "tokens_per_second_per_gpu": step.tokens_per_gpu,
        "tflops_per_gpu": step.tflops_per_gpu,
        "mfu": found.mfu,
        "steps": cost.steps,
        "hours": cost.hours,
        "gpu_hours": cost.gpu_hours,
        "submit_gpu_hours": cost.submit_gpu_hours,
        "recipe_gpu_hours": cost.recipe_gpu_hours,
        "saving_hours": cost.saving_hours,
        "reference_hours": cost.reference_hours,
        "segments": cost.segments.segments,
        "checkpoint_bytes": cost.disk.checkpoint,
        "checkpoint_files": cost.disk.files,
        "checkpoints_bytes": cost.disk.total,
    }
