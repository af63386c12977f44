"""Predictions beside published speeds and counted memory: docs/benchmarks/planner.{md,json}.

python -m tools.plan.published [out=docs/benchmarks] [memory=false]
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import PrecisionConfig
from conf.schema.errors import ConfigError
from data_shards.durable import replacing
from slurm.request import boolean
from tools.benchmarks.machine import facts
from tools.command import run, split_arguments
from tools.plan.efficiency import SUSTAINED
from tools.plan.memory import GIB, stage_memory
from tools.plan.published_later import LATER
from tools.plan.published_rows import ROWS, Published, job_of
from tools.plan.published_stages import amalia_rows
from tools.plan.step import Step, step

GOAL = 0.15
COMMAND = "python -m tools.plan.published"


def main(arguments: list[str]) -> None:
    """Write the page and its JSON."""
    ours, rest = split_arguments(arguments, ("out", "memory"))
    if rest:
        raise ConfigError(f"{rest[0]}: only out= and memory= are known; usage: {COMMAND} [out=DIR]")
    out = Path(ours.get("out", "docs/benchmarks"))
    record: dict[str, Any] = {
        **facts(COMMAND.split()),
        "goal": GOAL,
        "sustained": SUSTAINED,
        "speeds": [_speed(row) for row in ROWS],
        "later": [_speed(row) for row in LATER],
        "amalia": amalia_rows(),
    }
    errors = [entry["error"] for entry in record["speeds"] if not entry["calibrates"]]
    record["summary"] = summary(errors)
    record["later_summary"] = summary([entry["error"] for entry in record["later"]])
    if boolean("memory", ours.get("memory", "true")):
        record["memory"] = _memory()
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "planner.json") as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    with replacing(out / "planner.md") as file:
        file.write("\n".join(page(record)).encode() + b"\n")
    print("\n".join(_speed_table([*record["speeds"], *record["later"]])))
    print("At hand while the model was written:", _summary_line(record["summary"]))
    print("Predicted once, afterwards:", _summary_line(record["later_summary"]))


def summary(errors: Sequence[float]) -> dict[str, float]:
    """How good the rows are that calibrate nothing."""
    sizes = [abs(error) for error in errors]
    return {
        "rows": len(sizes),
        "within_goal": sum(size <= GOAL for size in sizes),
        "mean_error": statistics.mean(sizes),
        "median_error": statistics.median(sizes),
        "largest_error": max(sizes),
        "bias": math.exp(statistics.mean(math.log1p(error) for error in errors)) - 1,
    }


def _speed(row: Published) -> dict[str, Any]:
    job = job_of(row)
    found = step(job)
    return {
        "name": row.name,
        "source": row.source,
        "published_tokens_per_gpu": row.tokens_per_gpu,
        "predicted_tokens_per_gpu": found.tokens_per_gpu,
        "error": found.tokens_per_gpu / row.tokens_per_gpu - 1,
        "calibrates": row.calibrates,
        "assumed": row.assumed,
        "step_seconds": found.seconds,
        "shares": _shares(found),
    }


def _shares(found: Step) -> dict[str, float]:
    compute = found.compute
    parts = {
        "products": compute.products,
        "attention": compute.attention,
        "element-wise": compute.traffic,
        "tensor": compute.tensor,
        "context": compute.context,
        "recompute": found.recompute,
        "bubble": found.bubble,
        "sends": found.pipeline,
        "gradients": found.gradients,
        "optimizer": found.optimizer,
    }
    return {name: round(part / found.seconds, 3) for name, part in parts.items() if part}


def _sharded_states() -> dict[str, Any]:
    """What 128 instead of 8 GPUs save torchtitan's 8B: weights, gradients and moments in FP32."""
    held = []
    for name in ("torchtitan 8B compiled, 8 H100", "torchtitan 8B compiled, 128 H100"):
        row = next(row for row in ROWS if row.name == name)
        job = dataclasses.replace(job_of(row), precision=PrecisionConfig(params="fp32"))
        one = stage_memory(job, 0)
        held.append(one.weights + one.gradients + one.optimizer)
    predicted, measured = held[0] - held[1], (77.0 - 62.0) * GIB
    return {
        "name": "torchtitan 8B: saved by 128 instead of 8 GPUs",
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "remark": "77.0 and 62.0 GiB published; FP32 weights, gradients and moments, sharded",
    }


def _memory() -> list[dict[str, Any]]:
    import warnings

    warnings.filterwarnings("ignore")
    from tools.plan.cpu_memory import compare

    return [
        {
            "name": one.name,
            "predicted": one.predicted,
            "measured": one.measured,
            "error": one.error,
            "remark": one.remark,
        }
        for one in compare()
    ] + [_sharded_states()]


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| run | published | predicted | error | |", "|---|--:|--:|--:|---|"]
    for row in rows:
        mark = "calibrates" if row["calibrates"] else ""
        if abs(row["error"]) > GOAL:
            mark = "beyond the goal"
        lines.append(
            f"| {row['name']} | {row['published_tokens_per_gpu']:,.0f} | "
            f"{row['predicted_tokens_per_gpu']:,.0f} | {row['error']:+.1%} | {mark} |"
        )
    return lines


def _summary_line(found: Mapping[str, float]) -> str:
    return (
        f"{found['within_goal']:.0f} of {found['rows']:.0f} runs that calibrate nothing are "
        f"within {GOAL:.0%}; mean error {found['mean_error']:.1%}, median "
        f"{found['median_error']:.1%}, largest {found['largest_error']:.1%}, bias "
        f"{found['bias']:+.1%}."
    )


def page(record: Mapping[str, Any]) -> list[str]:
    """The Markdown page."""
    rows = [*record["speeds"], *record["later"]]
    sources = {row["source"] for row in rows}
    assumed: dict[str, list[str]] = {}
    for row in rows:
        if row["assumed"]:
            assumed.setdefault(row["assumed"], []).append(row["name"])
    lines = [
        "# The planner beside what others published",
        "",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}. Arithmetic only: no "
        "GPU was used, and none of these runs is ours. The model: [planner.md](../planner.md).",
        "",
        "## Speed, tokens per second and GPU",
        "",
        f"One constant is calibrated (what training leaves of an isolated kernel's rate, "
        f"{record['sustained']:g}), on the rows marked; the others validate. But they were at hand "
        "while the model was written, and four choices were made with them in sight: the share of "
        "FP8 products (0.78, from a benchmark of single products, after 0.66 and 0.72 had proved "
        "too low), the rates of fused attention within what its authors' figures allow, the "
        "traffic of merging partial results under context parallelism, and one "
        "micro-batch of four sequences in Megatron-LM's table (with four micro-batches of one, its "
        "32B run could not hide its gradients: -27 %). " + _summary_line(record["summary"]),
        "",
        *_speed_table(record["speeds"]),
        "",
        "### Held out",
        "",
        "Predicted once, when every constant was settled, and not touched since. "
        + _summary_line(record["later_summary"])
        + " The two beyond it are PyTorch's own context parallelism over 128 k tokens and more, "
        "whose ring is slower than the one assumed.",
        "",
        *_speed_table(record["later"]),
        "",
        "Sources: " + "; ".join(sorted(sources)) + ".",
        "",
        "Where a source leaves something open, this is assumed:",
        "",
        *(f"- {what}: {'; '.join(names)}." for what, names in assumed.items()),
        "",
        "Not in the table: Megatron-LM's rows with pipelines (its interleaving is not stated), "
        "mixture-of-experts models, torchtitan's 70B and 405B (asynchronous tensor parallelism, "
        "which we do not have). torchtitan shards weights over all GPUs (FSDP), which this project "
        "does not: the planner models that traffic for these rows alone.",
        "",
        "## AMALIA's own stages",
        "",
        "Hours and GPUs are published; batches, tokens and pairs are not. So beside the prediction "
        "for our recipe stands what the published hours would mean at the predicted speed.",
        "",
        "| stage | published | predicted for our recipe | error | at the predicted speed that is |",
        "|---|---|---|--:|---|",
        *(
            f"| {row['name']} | {row['published']} | {row['predicted']} | {row['error']:+.0%} | "
            f"{row['implied']} |"
            for row in record["amalia"]
        ),
    ]
    if "memory" in record:
        lines += [
            "",
            "## Memory, bytes",
            "",
            "Counted on a CPU, one process, small widths: weights, DDP's buffers and the "
            "optimizer's state of real Megatron objects, and what autograd keeps "
            "(`torch.autograd.graph.saved_tensors_hooks`, each storage once, parameters left out). "
            "A layer's bytes are the difference of two depths. CUDA's allocator, NCCL and "
            "Transformer Engine's own workspaces cannot be seen here: not measured. The last row: "
            "torchtitan's, at real size.",
            "",
            "| | predicted | counted | error | |",
            "|---|--:|--:|--:|---|",
            *(
                f"| {row['name']} | {row['predicted']:,.0f} | {row['measured']:,.0f} | "
                f"{row['error']:+.1%} | {row['remark']} |"
                for row in record["memory"]
            ),
            "",
            "At real size on a GPU: `python -m tools.plan.measured`. Not run.",
        ]
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
