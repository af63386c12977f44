"""Tokens a second of stage 2 against transformers' own model: same weights, documents, threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from data_shards.batch import PackedBatch
from models.anyres import AnyresGeometry
from tools.benchmarks import machine
from tools.benchmarks.demo_batches import prepare, stage_data
from tools.benchmarks.documents import Document, lay, split
from tools.benchmarks.sides import counts_of, our_training, transformers_training
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, Turns, spread, take_turns

PLAIN, GROUPED = "transformers, batches in plan order", "transformers, group_by_length"
PACKED, PADDED = "ours, packed", "ours, the batches of the first row padded alike"
GOALS = {(PACKED, PLAIN): 1.5, (PACKED, GROUPED): 1.5, (PADDED, PLAIN): 0.9}
METHOD = """
The demo's stage 2 (tiny model, its own mixture of captions, questions, style and text), one
process, float32. Each side has the same initial weights (their losses on the same documents are
compared before anything is timed) and trains on the same documents, forward, backward, clipping
and AdamW. Tokens are real ones: padding is work, never counted. transformers runs
`LlavaNextForConditionalGeneration` (sdpa attention, `use_cache=False`, fused AdamW) in a plain
loop without the Trainer's own overhead, right-padded to the longest of each micro-batch: once in
the plan's (random) order, once in the order of the Trainer's `group_by_length` with all documents
in one mega-batch, the tightest grouping that it can give. A micro-batch of transformers holds as
many documents as one of ours does on average, an optimizer step as many micro-batches. Ours is
`pipeline.step.train_step` as in training. Reading, decoding, tokenising and padding are outside
the clock on both sides; transformers gets normalised float pixels, ours normalises its bytes
inside.
"""


@dataclass(frozen=True)
class Stage2Data:
    """The same documents in each side's arrangement."""

    config: Config
    packed: list[list[PackedBatch]]  # steps of micro-batches
    documents: list[list[Document]]  # of each micro-batch of `packed`, in order
    plain: list[list[Document]]
    grouped: list[list[Document]]
    padded: list[list[PackedBatch]]
    accumulation: int


def grouped_order(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """The Trainer's `group_by_length` with everything in one mega-batch."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order: list[int] = get_length_grouped_indices(
        list(lengths),
        batch,
        mega_batch_mult=-(-len(lengths) // batch),
        generator=torch.Generator().manual_seed(seed),
    )
    return order


def stage2_data(work: Path, steps: int) -> Stage2Data:
    """The first `steps` steps of the demo's stage 2."""
    config, data = stage_data(work, "stage2", f"stage.steps={steps}")
    geometry, pad_id = data.geometry, data.tokenizer.pad_id
    manifests = [data.manifests[name] for name in data.plan.names]
    packed = [micro for _, micro in data.batches(0)]
    documents = [
        _documents(batch, manifests, geometry)
        for micro_batches in packed
        for batch in micro_batches
    ]
    flat = [document for part in documents for document in part]
    accumulation = len(packed[0])
    size = round(len(flat) / len(documents))
    order = grouped_order([len(d) for d in flat], size * accumulation, seed=0)
    plain = [flat[first : first + size] for first in range(0, len(flat), size)]
    rows = [flat[number] for number in order]
    grouped = [rows[first : first + size] for first in range(0, len(rows), size)]
    alike = [lay([[d] for d in part], max(map(len, part)), geometry, pad_id) for part in plain]
    return Stage2Data(
        config=config,
        packed=packed,
        documents=documents,
        plain=plain,
        grouped=grouped,
        padded=[alike[n : n + accumulation] for n in range(0, len(alike), accumulation)],
        accumulation=accumulation,
    )


def _documents(
    batch: PackedBatch, manifests: Sequence[Any], geometry: AnyresGeometry
) -> list[Document]:
    lengths, sizes = [], []
    for which, row in batch.sample_ids.tolist():
        manifest = manifests[which]
        images = slice(manifest.first_image[row], manifest.first_image[row + 1])
        lengths.append(int(manifest.tokens[row]))
        sizes.append([(int(h), int(w)) for h, w in manifest.image_hw[images]])
    return split(batch, lengths, sizes, geometry)


def stage2_sides(data: Stage2Data, threads: int) -> list[Side]:
    """The four rows of the table."""
    shared = {"model": data.config.model, "config": data.config, "threads": threads}
    theirs = {**shared, "accumulation": data.accumulation, "check": data.documents[0]}
    ours = {**shared, "check": data.packed[0][0], "counts": counts_of(data.documents)}
    return [
        Side(PLAIN, transformers_training, {**theirs, "batches": data.plain}),
        Side(PACKED, our_training, {**ours, "steps": data.packed}),
        Side(GROUPED, transformers_training, {**theirs, "batches": data.grouped}),
        Side(PADDED, our_training, {**ours, "steps": data.padded}),
    ]


def rows_of(turns: Turns) -> list[list[str | float | int | None]]:
    """One row a side, and its ratio to each side of transformers."""
    rows: list[list[str | float | int | None]] = []
    for side in (PLAIN, GROUPED, PACKED, PADDED):
        ratio = {
            reference: spread(turns.ratios(side, reference, "tokens"))
            for mine, reference in GOALS
            if mine == side
        }
        rows.append(
            [
                side,
                turns.median(side, "tokens"),
                turns.median(side, "targets"),
                turns.value(side, "tokens") / turns.value(side, "row_tokens"),
                ratio.get(PLAIN, ""),
                ratio.get(GROUPED, ""),
            ]
        )
    return rows


def verdicts(turns: Turns) -> list[str]:
    """Each goal beside what was measured, or that nothing can be said."""
    found = []
    for (side, reference), goal in GOALS.items():
        ratios = turns.ratios(side, reference, "tokens")
        median = sorted(ratios)[len(ratios) // 2]
        what = "reached" if median >= goal else "missed"
        if machine.disturbed(turns.others):
            what = "not judged"
        by_cpu = spread(turns.ratios(side, reference, "tokens", "cpu_seconds"))
        found.append(
            f"{side}, against {reference}: goal {goal}, {what}; by processor time {by_cpu}."
        )
    return found


def check_losses(turns: Turns) -> str:
    """Both sides' loss on the first micro-batch's documents, before training.

    Raises:
        ValueError: they differ by more than rounding, so that different things would be compared.
    """
    theirs, ours = turns.value(PLAIN, "check_loss"), turns.value(PACKED, "check_loss")
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise ValueError(
            f"the two sides do not compute the same loss ({ours} and {theirs}); nothing is compared"
        )
    return f"Loss of the first documents before training: {theirs:.6f} (transformers), {ours:.6f}."


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "stage 2 against transformers"."""
    prepare(work, scale)
    data = stage2_data(work, steps)
    taken = take_turns(stage2_sides(data, threads), turns, say=say)
    check = check_losses(taken)
    warning = machine.disturbed(taken.others)
    return Section(
        title="Stage 2 against transformers",
        method=METHOD,
        columns=[
            "side",
            "tokens/s",
            "target tokens/s",
            "real tokens",
            "tokens/s against plan order",
            "against group_by_length",
        ],
        rows=rows_of(taken),
        facts=machine.facts(),
        notes=[*([warning] if warning else []), *verdicts(taken), check],
        settings={
            "threads": threads,
            "turns": turns,
            "steps": steps,
            "documents": int(taken.value(PLAIN, "documents")),
            "documents a micro-batch": len(data.plain[0]),
        },
        data={"reports": taken.reports, "others": taken.others},
    )
