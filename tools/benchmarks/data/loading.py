"""The loader itself, shards to packed batches, with one prefetching thread and with two."""

import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from conf.compose import compose
from conf.schema.data import DataConfig, SourceConfig
from conf.schema.stage import LearningRates, StageConfig
from models.anyres import AnyresGeometry
from tools.benchmarks import machine
from tools.benchmarks.data.build_sides import prepare
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, Turns, spread, take_turns

SEQUENCE, PACKS = 16_384, 2
NAMES = {0: "no thread of its own", 1: "one thread", 2: "two threads"}
METHOD = """
`data_shards.loader.Loader` from shards in the page cache to packed micro-batches: index, pread,
CRC-32, record, chat template, tokens, decoding, tiles in uint8, packing. The data set of the
section on building (pictures of 1024x768, some 2048x1536), AMALIA-VL's geometry, one pass of the
plan a turn, packs of 16 384 tokens; each side in a process of its own, in turn. Wall clock for the
rate, since threads are what is asked about; CPU time beside it.
"""


def load_all(work: Path, scale: float, workers: int) -> Callable[[], dict[str, float]]:
    """One side: every step of the plan once a turn."""
    from data_shards.build import build_dataset
    from data_shards.chat import ChatTokenizer
    from data_shards.loader import Loader
    from data_shards.plan import build_plan

    source = prepare(work / "build", scale)
    geometry = AnyresGeometry.from_model(compose(["model=amalia_vl_9b", "data=demo"]).model)
    tokenizer = ChatTokenizer.from_directory(source.tokenizer)
    config = SourceConfig(str(source.path), licence="CC0-1.0")
    data = DataConfig(str(work / "loading"), str(source.tokenizer), {"set": config})
    data.mix = {"stage2": {"set": 1.0}}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        manifest = build_dataset("set", config, data, geometry, tokenizer.digest())
    stage = StageConfig(
        "stage2", 2, "sft", LearningRates(language=1e-5), SEQUENCE, PACKS, epochs=1.0
    )
    plan = build_plan({"set": manifest}, data, stage)
    loader = Loader(plan, {"set": manifest}, tokenizer, geometry, workers=workers)

    def turn() -> dict[str, float]:
        images = tokens = 0
        started = time.perf_counter()
        for _, batches in loader.batches():
            images += sum(batch.n_images for batch in batches)
            tokens += sum(len(batch.tokens_T) for batch in batches)
        seconds = time.perf_counter() - started
        if loader.n_masked:
            raise ValueError(f"{loader.n_masked} samples were masked")
        return {"seconds": seconds, "images": images, "tokens": tokens, "steps": plan.steps}

    return turn


def rows_of(taken: Turns) -> list[list[str | float | int | None]]:
    """Rates by the clock, CPU time, and the rate over that of one thread."""
    return [
        [
            name,
            taken.median(name, "images"),
            taken.median(name, "tokens"),
            1e3 * taken.value(name, "cpu_seconds") / taken.value(name, "images"),
            "" if name == NAMES[1] else spread(taken.ratios(name, NAMES[1], "images")),
        ]
        for name in NAMES.values()
    ]


def measure(work: Path, scale: float, turns: int, say: Callable[[str], None], **_: Any) -> Section:
    """The table "From shards to batches"."""
    prepare(work / "build", scale)
    shared = {"work": work, "scale": scale}
    sides = [Side(name, load_all, {**shared, "workers": n}) for n, name in NAMES.items()]
    sides[0].setup(**sides[0].arguments)  # builds the data set, before three would do so at once
    taken = take_turns(sides, turns, say=say)
    warning = machine.disturbed(taken.others)
    return Section(
        title="From shards to batches",
        method=METHOD,
        columns=["loader", "images/s", "tokens/s", "CPU ms an image", "against one thread"],
        rows=rows_of(taken),
        facts=machine.facts(),
        notes=[warning] if warning else [],
        settings={
            "turns": turns,
            "images": int(taken.value(NAMES[1], "images")),
            "steps": int(taken.value(NAMES[1], "steps")),
            "cores": os.cpu_count() or 0,
        },
        data={"reports": taken.reports, "others": taken.others},
    )
