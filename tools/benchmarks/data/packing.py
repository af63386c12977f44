"""How full packs are and how level their work is, beside the usual ways of packing."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from conf.compose import compose
from conf.schema import Config, StageConfig
from conf.schema.data import DataConfig
from data_shards.balance import PackCost, assign
from data_shards.manifest import Manifest
from data_shards.plan import Plan, build_plan
from models.anyres import AnyresGeometry
from models.flops import batch_flops, training_flops
from tools.benchmarks import machine
from tools.benchmarks.data.manifests import CAPTIONS, CHATS, DOCUMENTS, TEXT, Law, write_law
from tools.benchmarks.table import Section

LAWS: dict[str, Law] = {"captions": CAPTIONS, "chats": CHATS, "documents": DOCUMENTS, "text": TEXT}
MIXED, IMAGES = "mixed", "images only"
SETS = {
    MIXED: {"captions": 0.25, "chats": 0.30, "documents": 0.20, "text": 0.25},
    IMAGES: {"captions": 0.40, "chats": 0.40, "documents": 0.20},
}
OURS, TIGHT = "ours", "ours without a limit on tiles"
NEXT, SORTED, ALONE = "next fit, as the samples come", "first fit, 1,000 sorted", "one a row"
REAL = {MIXED: 0.99, IMAGES: 0.975}  # goals
LEVEL_ALONE, LEVEL_FOUR = 1.10, 1.05
REPLICAS, STEPS = 32, 400  # data-parallel replicas; steps looked at
METHOD = f"""
Packs of 16,384 tokens, AMALIA-VL's geometry (384 px, at most 12 tiles and the base), settings of
conf/stage/stage2.yaml. No pictures are read: sizes follow an assumed law (lognormal areas, median
0.45 megapixels, one text of 150 to 350 tokens a picture; text alone 735 tokens in the median),
*mixed* has 25 % text-only samples and 3 % with two pictures, *images only* none without a picture.

*real*: tokens of samples over all tokens. The other columns are the heaviest of {REPLICAS} replicas
beside the mean one, means over steps: tiles with one pack each, tiles with four each, and FLOPs of
vision tower and attention with four each (stage 2, everything trained). "In order": replica r takes
packs r, r + {REPLICAS}, ...; "level": `data_shards.balance`. *us*: CPU time of packing a sample.
"""


@dataclass(frozen=True)
class Packed:
    """What a way of packing made of the samples of a set."""

    real: float
    alone: float  # tiles, heaviest over mean replica, one pack each
    ordered: tuple[float, float]  # tiles and FLOPs, four packs each, in order
    level: tuple[float, float]  # levelled
    microseconds: float | None


def stage2() -> Config:
    """The configuration whose packs are looked at."""
    return compose(["model=amalia_vl_9b", "data=amalia", "stage=stage2"])


def write_manifests(folder: Path, samples: int, geometry: AnyresGeometry) -> dict[str, Manifest]:
    """One for each of `LAWS`, together `samples`."""
    return {
        name: write_law(folder / name, law, samples // len(LAWS), geometry, seed=number)
        for number, (name, law) in enumerate(LAWS.items())
    }


def mixture(weights: Mapping[str, float], **changes: object) -> DataConfig:
    """Stage 2 draws with these weights."""
    data = DataConfig(root="-", tokenizer="-", mix={"stage2": dict(weights)})
    return replace(data, **changes)  # type: ignore[arg-type]


def pack_cost(config: Config) -> PackCost:
    """FLOPs of a tile and of a pair of tokens where everything is trained."""
    everything = {"vision", "connector", "language"}

    def flops(attended: int, tiles: int) -> float:
        return training_flops(batch_flops(config.model, 0, attended, 0, tiles), everything).total

    return PackCost(tile=flops(0, 1), pair=flops(1, 0))


def look_at(plan: Plan, cost: PackCost, microseconds: float | None) -> Packed:
    """The figures of packs, whoever packed them."""
    tiles, work = plan.tiles.astype(float), cost.of(plan.tiles, plan.attention)
    rows = tiles[: len(tiles) // REPLICAS * REPLICAS].reshape(-1, REPLICAS)
    four = replace(plan, packs_per_step=4 * REPLICAS, steps=len(tiles) // (4 * REPLICAS))
    found: list[list[float]] = []
    for step in range(min(STEPS, four.steps)):
        numbers = four.pack_numbers(step)
        ordered = [list(numbers[rank::REPLICAS]) for rank in range(REPLICAS)]
        level = [sum(mine, []) for mine in assign(four, step, REPLICAS, 1, cost)]
        found.append([_over(v, share) for share in (ordered, level) for v in (tiles, work)])
    means = np.mean(found, axis=0).tolist()
    return Packed(
        real=plan.report["efficiency"],
        alone=float((rows.max(axis=1) / rows.mean(axis=1)).mean()),
        ordered=(means[0], means[1]),
        level=(means[2], means[3]),
        microseconds=microseconds,
    )


def _over(values: np.ndarray, shares: Sequence[Sequence[int]]) -> float:
    sums = np.array([values[list(share)].sum() for share in shares])
    return float(sums.max() / sums.mean())


def next_fit(tokens: Sequence[int], length: int) -> list[int]:
    """The pack of each sample: the one before, or a new one."""
    packs, number, room = [], -1, 0
    for size in tokens:
        if size > room:
            number, room = number + 1, length
        room -= size
        packs.append(number)
    return packs


def sorted_first_fit(tokens: Sequence[int], length: int, buffer: int = 1000) -> list[int]:
    """First fit of every `buffer` samples, the longest first."""
    packs = [0] * len(tokens)
    begun = 0
    for first in range(0, len(tokens), buffer):
        rooms: list[int] = []
        chosen = range(first, min(first + buffer, len(tokens)))
        for position in sorted(chosen, key=lambda n: -tokens[n]):
            size = tokens[position]
            place = next((n for n, room in enumerate(rooms) if room >= size), len(rooms))
            if place == len(rooms):
                rooms.append(length)
            rooms[place] -= size
            packs[position] = begun + place
        begun += len(rooms)
    return packs


def repacked(plan: Plan, manifests: Mapping[str, Manifest], packs: Sequence[int]) -> Plan:
    """The plan's samples in these packs."""
    order = np.argsort(np.asarray(packs), kind="stable")
    count = int(max(packs)) + 1
    columns = {"tokens": np.zeros(len(order), np.int64), "tiles": np.zeros(len(order), np.int64)}
    for which, name in enumerate(plan.names):
        mine = plan.samples[:, 0] == which
        for column, values in columns.items():
            values[mine] = getattr(manifests[name], column)[plan.samples[mine, 1]]
    pairs = columns["tokens"] * (columns["tokens"] + 1) // 2
    real = columns["tokens"].sum() / (count * plan.sequence_length)
    return replace(
        plan,
        samples=plan.samples[order],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(packs, minlength=count))]),
        tiles=np.bincount(packs, columns["tiles"], count).astype(np.int64),
        attention=np.bincount(packs, pairs, count).astype(np.int64),
        report={"efficiency": float(real)},
    )


def _ways(
    data: DataConfig,
    manifests: Mapping[str, Manifest],
    stage: StageConfig,
    turns: int,
    cost: PackCost,
) -> dict[str, Packed]:
    """Every way of packing the same samples, the sides of a turn one after another."""
    plans: dict[str, Plan] = {}
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Plan]) -> None:
        began = time.process_time()
        plans[name] = work()
        seconds.setdefault(name, []).append(time.process_time() - began)

    free = replace(stage, max_tiles_over_mean=None)
    alone = replace(stage, packing=False)
    for _ in range(turns):
        # What drawing costs, without packing, is taken off below.
        timed(ALONE, lambda: build_plan(manifests, data, alone))
        timed(OURS, lambda: build_plan(manifests, data, stage))
        timed(TIGHT, lambda: build_plan(manifests, data, free))
    base = plans[ALONE]
    tokens = sizes_of(base, manifests).tolist()
    for way, function in ((NEXT, next_fit), (SORTED, sorted_first_fit)):
        for _ in range(turns):
            began = time.process_time()
            packs = function(tokens, stage.sequence_length)
            seconds.setdefault(way, []).append(time.process_time() - began)
        plans[way] = repacked(base, manifests, packs)
    drawing = statistics.median(seconds[ALONE])
    found = {}
    for way in (ALONE, NEXT, SORTED, TIGHT, OURS):
        spent = statistics.median(seconds[way]) - (drawing if way in (TIGHT, OURS) else 0)
        packing = None if way == ALONE else 1e6 * spent / len(plans[way].samples)
        found[way] = look_at(plans[way], cost, packing)
    return found


def sizes_of(plan: Plan, manifests: Mapping[str, Manifest]) -> np.ndarray:
    """int64, tokens of each of the plan's samples."""
    tokens = np.zeros(len(plan.samples), np.int64)
    for which, name in enumerate(plan.names):
        mine = plan.samples[:, 0] == which
        tokens[mine] = manifests[name].tokens[plan.samples[mine, 1]]
    return tokens


def _row(name: str, way: str, packed: Packed) -> list[str | float | int | None]:
    over = [packed.alone, packed.ordered[0], packed.level[0], packed.ordered[1], packed.level[1]]
    figures = [f"{value:.3f}" for value in over]
    if way == ALONE:
        figures = [""] * len(over)  # a row a pack: other numbers of samples a step
    return [name, way, f"{packed.real:.2%}", *figures, packed.microseconds]


def _verdicts(name: str, ours: Packed) -> list[str]:
    goals = (
        (f"{ours.real:.2%} real tokens", ours.real >= REAL[name], f"at least {REAL[name]:.1%}"),
        (
            f"tiles of the heaviest of {REPLICAS} replicas {ours.alone:.3f} with one pack each",
            ours.alone <= LEVEL_ALONE,
            f"at most {LEVEL_ALONE:.2f}",
        ),
        (
            f"{ours.level[0]:.3f} with four",
            ours.level[0] <= LEVEL_FOUR,
            f"at most {LEVEL_FOUR:.2f}",
        ),
    )
    return [
        f"{name}, {OURS}: {what} (goal: {goal}): {'met' if met else 'MISSED'}"
        for what, met, goal in goals
    ]


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "Packing"."""
    config = stage2()
    samples = int(400_000 * scale)
    cost = pack_cost(config)
    manifests = write_manifests(work / "packing", samples, AnyresGeometry.from_model(config.model))
    stage = replace(config.stage, steps=None, epochs=0.5)
    rows: list[list[str | float | int | None]] = []
    notes: list[str] = []
    figures = {}
    for name, weights in SETS.items():
        found = _ways(mixture(weights), manifests, stage, turns, cost)
        for way, packed in found.items():
            figures[f"{name}: {way}"] = vars(packed)
            rows.append(_row(name, way, packed))
        say(f"{name}: {found[OURS].real:.2%} real tokens")
        notes += _verdicts(name, found[OURS])
    return Section(
        title="Packing",
        method=METHOD,
        columns=[
            "samples",
            "packing",
            "real",
            "tiles, 1 pack",
            "tiles, 4 in order",
            "tiles, 4 level",
            "FLOPs, 4 in order",
            "FLOPs, 4 level",
            "us",
        ],
        rows=rows,
        facts=machine.facts(),
        notes=notes,
        settings={
            "turns": turns,
            "samples": samples,
            "max_tiles_over_mean": stage.max_tiles_over_mean,
            "document_multiple": stage.document_multiple,
        },
        data=figures,
    )
