"""Tokens a second of a pass of stage 3 (DPO) against one of stage 2."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.schema import Config
from data_shards.batch import PackedBatch
from tools.benchmarks import machine
from tools.benchmarks.demo_batches import prepare, stage_data
from tools.benchmarks.sides import our_training
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, spread, take_turns

STAGE2, STAGE3 = "stage 2, its own data", "stage 3, preference pairs"
SAME_ROWS = "stage 2's loss on the rows of stage 3"
GOAL = 0.9
METHOD = """
One training pass (forward, backward, optimizer) of stage 3 against one of stage 2: tiny model,
all three parts trained in both, one process, float32, the same packs of 512 tokens. Reference
log-probabilities are looked up, as in training: stage 3 holds no second model and makes no second
pass. Both answers of a pair are counted, and a pair's tiles run once. The third row gives stage
2's loss the very rows of stage 3, so that only the objective differs. Reading is outside the
clock.
"""


def _data(
    work: Path, stage: str, steps: int
) -> tuple[Config, list[list[PackedBatch]], dict[str, float]]:
    words = [f"stage.steps={steps}", "stage.epochs=null"]
    words += [f"stage.lr.{part}=1e-4" for part in ("vision", "connector", "language")]
    config, data = stage_data(work, stage, *words)
    counted = [data.counts(step, 0) for step in range(steps)]
    batches = [micro for _, micro in data.batches(0)]
    counts = {
        "tokens": float(sum(count.tokens for count in counted)),
        "tiles": float(sum(count.tiles for count in counted)),
        "targets": float(sum(b.loss_mask_T.sum() for micro in batches for b in micro)),
    }
    return config, batches, counts


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "stage 3 against stage 2"."""
    prepare(work, scale)
    sides = []
    for name, stage in ((STAGE2, "stage2"), (STAGE3, "stage3")):
        config, batches, counts = _data(work, stage, steps)
        arguments: dict[str, Any] = {
            "model": config.model,
            "steps": batches,
            "counts": counts,
            "config": config,
            "threads": threads,
        }
        sides.append(Side(name, our_training, arguments))
    supervised = replace(config, stage=replace(config.stage, objective="sft"))
    sides.append(Side(SAME_ROWS, our_training, {**arguments, "config": supervised}))
    taken = take_turns(sides, turns, say=say)
    rows: list[list[str | float | int | None]] = [
        [
            side.name,
            taken.median(side.name, "tokens"),
            taken.value(side.name, "tiles") / taken.value(side.name, "tokens") * 1000,
            taken.value(side.name, "targets") / taken.value(side.name, "tokens"),
            "" if side.name == STAGE3 else spread(taken.ratios(STAGE3, side.name, "tokens")),
        ]
        for side in sides
    ]
    warning = machine.disturbed(taken.others)
    ratios = sorted(taken.ratios(STAGE3, STAGE2, "tokens"))
    what = "reached" if ratios[len(ratios) // 2] >= GOAL else "missed"
    by_cpu = spread(taken.ratios(STAGE3, STAGE2, "tokens", "cpu_seconds"))
    same = spread(taken.ratios(STAGE3, SAME_ROWS, "tokens", "cpu_seconds"))
    verdict = (
        f"Stage 3 against stage 2: goal {GOAL}, {'not judged' if warning else what}; by processor "
        f"time {by_cpu}, and {same} on the same rows."
    )
    return Section(
        title="Stage 3 against stage 2",
        method=METHOD,
        columns=[
            "what runs",
            "tokens/s",
            "tiles per 1000 tokens",
            "targets per token",
            "stage 3's tokens/s against this",
        ],
        rows=rows,
        facts=machine.facts(),
        notes=[*([warning] if warning else []), verdict],
        settings={"threads": threads, "turns": turns, "steps": steps},
        data={"reports": taken.reports, "others": taken.others},
    )
