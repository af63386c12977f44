"""The order of a whole run as a pure function of (manifests, mixture, seed, stage).

Position in a run is (plan digest, step). Nothing else influences which packs make a step: not
workers, not ranks, not buffers. Who trains on which of them is `data_shards.balance`'s part.

Samples stream through: drawn, packed, written. In memory are the open packs and a few shards' row
numbers, so a hundred million samples need no more than a million do.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema.data import DataConfig
from conf.schema.stage import StageConfig
from data_shards.manifest import Manifest
from data_shards.mixture import draws, every_sample, positive
from data_shards.packing import Packer, PackLimits
from data_shards.plan_sources import (
    PlanError,
    PlannedPhase,
    PlanSource,
    drawn_manifests,
    every_source,
    open_sources,
    plan_phases,
    tile_limit,
)
from data_shards.plan_writer import PlanWriter, sizes

__all__ = [
    "ALGORITHM",
    "Plan",
    "PlanError",
    "build_plan",
    "plan_digest",
    "plan_inputs",
    "sequential_plan",
]

ALGORITHM = 2  # raise it when the same inputs would give another order
_TRIAL = 1 << 15  # samples that are packed to see how the packs of a phase fill best
_WORTH_A_TRIAL = 256  # packs of the whole plan
_STAGE = (
    "sequence_length",
    "global_batch_size",
    "packing",
    "document_multiple",
    "max_tiles_per_pack",
    "max_tiles_over_mean",
)


@dataclass(frozen=True)
class Plan:
    """Which samples stand in which pack of which step.

    Attributes:
        digest: SHA-256 (hex) of everything the plan was made from, and of its content.
        names: the data sets, in the order of their numbers.
        steps: optimizer steps.
        packs_per_step: packs of one global batch.
        sequence_length, document_multiple: tokens; as in the stage.
        offsets: int64 [packs + 1]; the samples of pack p are samples[offsets[p]:offsets[p + 1]].
        samples: int32 [n, 2]; (data set number, manifest row).
        tiles: int32 [packs].
        attention: int64 [packs]; (query, key) pairs of causal attention, padding excluded.
        refused: samples of each data set that are too large for any pack.
        report: figures for people: efficiency, shares, epochs of each data set.
        inputs: what the plan is a function of, ready for JSON.
        contents: SHA-256 (hex) of the values of offsets, samples, tiles and attention.
    """

    digest: str
    names: tuple[str, ...]
    steps: int
    packs_per_step: int
    sequence_length: int
    document_multiple: int
    offsets: np.ndarray
    samples: np.ndarray
    tiles: np.ndarray
    attention: np.ndarray
    refused: Mapping[str, int]
    report: Mapping[str, Any]
    inputs: Mapping[str, Any]
    contents: Mapping[str, str]

    def pack_numbers(self, step: int) -> range:
        """The packs of one step.

        Raises:
            PlanError: a step outside the plan.
        """
        if not 0 <= step < self.steps:
            raise PlanError(f"step {step} is outside the plan's {self.steps} steps")
        return range(step * self.packs_per_step, (step + 1) * self.packs_per_step)

    def pack(self, number: int) -> np.ndarray:
        """The samples of one pack, int32 [samples, 2]."""
        return self.samples[self.offsets[number] : self.offsets[number + 1]]

    def packs(self, step: int) -> list[np.ndarray]:
        """All packs of one step, in order. Raises as `pack_numbers`."""
        return [self.pack(number) for number in self.pack_numbers(step)]


def build_plan(
    manifests: Mapping[str, Manifest],
    data: DataConfig,
    stage: StageConfig,
    folder: Path | None = None,
) -> Plan:
    """The plan of one stage.

    `stage.steps` counts steps; `stage.epochs` counts passes over as many samples as the data sets
    hold together, rounded up to whole steps. Every step is full.

    Args:
        manifests: data sets by name; those with a positive weight are used.
        data: mixture or curriculum, what weights are shares of, and how far samples are shuffled.
        folder: where to write the plan's columns, which are then mapped; None: in memory.

    Raises:
        PlanError: nothing to draw from, data sets built for different tokenizers, pairs where the
            objective wants samples, or more than 1 % of the samples too long.
    """
    sources = open_sources(manifests, data, stage)
    wanted = None
    if stage.epochs is not None:
        wanted = math.ceil(stage.epochs * sum(len(source.mix) for source in sources))
    phases = plan_phases(sources, data, stage, wanted)
    target = None if stage.steps is None else stage.steps * stage.global_batch_size
    packs = target or (wanted or 0) / min(phase.samples for phase in phases)
    writer = PlanWriter(sources, stage, folder)
    packer = _packer(sources, stage, packs, target)
    mix = [source.mix for source in sources]
    short = [_short(sources, phase, data, stage, packs) for phase in phases]
    drawn = 0
    for number, chunk in draws(
        mix, [phase.mix for phase in phases], stage.seed, data.shuffle_shards
    ):
        packer.tiles, packer.short = tile_limit(sources, phases[number], stage), short[number]
        cut = len(chunk) if wanted is None else min(max(wanted - drawn, 0), len(chunk))
        placed = writer.pack(packer, chunk[:cut])
        if placed == cut < len(chunk):
            if packer.target is None:
                packer.target = -(-packer.begun // stage.global_batch_size)
                packer.target *= stage.global_batch_size
            placed += writer.pack(packer, chunk[cut:])
        if placed < len(chunk):
            break
        drawn += len(chunk)
    return _plan(writer, packer, plan_inputs("training", manifests, data, stage), stage)


def sequential_plan(
    manifests: Mapping[str, Manifest],
    data: DataConfig,
    stage: StageConfig,
    folder: Path | None = None,
) -> Plan:
    """Every sample that `build_plan` could draw, exactly once, in the order of the manifests.

    The last step is filled up with empty packs. Raises as `build_plan`.
    """
    sources = open_sources(manifests, data, stage)
    phase = every_source(sources, stage)
    writer = PlanWriter(sources, stage, folder)
    samples = sum(len(source.mix) for source in sources)
    packer = _packer(sources, stage, samples / phase.samples, None)
    packer.tiles = tile_limit(sources, phase, stage)
    for chunk in every_sample([source.mix for source in sources]):
        writer.pack(packer, chunk)
    return _plan(writer, packer, plan_inputs("sequential", manifests, data, stage), stage)


def plan_inputs(
    kind: str, manifests: Mapping[str, Manifest], data: DataConfig, stage: StageConfig
) -> dict[str, Any]:
    """All that a plan of this kind (training, sequential) is a function of, ready for JSON.

    Raises:
        PlanError: nothing to draw from, or a manifest is missing.
    """
    manifests = drawn_manifests(manifests, data, stage)
    first = next(iter(manifests.values())).info
    found = {
        "algorithm": ALGORITHM,
        "kind": kind,
        "manifests": {name: manifest.info.digest for name, manifest in manifests.items()},
        "tokenizer": first.tokenizer_digest,
        "geometry": first.geometry_digest,
        "pillow": first.pillow,
        "stage": {name: getattr(stage, name) for name in _STAGE},
    }
    return found if kind == "sequential" else {**found, **_drawn_by(data, stage)}


def plan_digest(inputs: Mapping[str, Any], contents: Mapping[str, str]) -> str:
    """SHA-256 of a plan: the content too, as NumPy does not promise the same permutations in every
    version."""
    text = json.dumps([inputs, contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _drawn_by(data: DataConfig, stage: StageConfig) -> dict[str, Any]:
    phases = [[phase.until, positive(phase.weights)] for phase in data.phases(stage.name)]
    return {
        "phases": phases,
        "weigh_by": data.weigh_by,
        "shuffle_shards": data.shuffle_shards,
        "seed": stage.seed,
        "steps": stage.steps,
        "epochs": stage.epochs,
    }


def _packer(
    sources: Sequence[PlanSource], stage: StageConfig, packs: float, target: int | None
) -> Packer:
    limits = PackLimits(
        tokens=stage.sequence_length,
        packing=stage.packing,
        least_tokens=min(source.least_tokens for source in sources),
        least_tiles=min(source.least_tiles for source in sources),
    )
    return Packer(limits, packs, target)


def _short(
    sources: Sequence[PlanSource],
    phase: PlannedPhase,
    data: DataConfig,
    stage: StageConfig,
    packs: float,
) -> int:
    """`Packer.short` for a phase: whichever fills the packs of its first samples best."""
    if not stage.packing or packs < _WORTH_A_TRIAL:
        return 0
    samples, count = np.empty((0, 2), np.int64), min(_TRIAL, int(packs * phase.samples))
    mix = [source.mix for source in sources]
    for _, chunk in draws(mix, [replace(phase.mix, until=None)], stage.seed, data.shuffle_shards):
        samples = np.concatenate([samples, chunk])
        if len(samples) >= count:
            break
    samples = samples[:count]
    used = []
    for short in (0, *phase.short):
        packer = _packer(sources, stage, len(samples) / phase.samples, None)
        packer.tiles, packer.short = tile_limit(sources, phase, stage), short
        packer.add(*sizes(sources, samples, stage))
        used.append((packer.begun, short))
    return min(used)[1]


def _plan(
    writer: PlanWriter, packer: Packer, inputs: Mapping[str, Any], stage: StageConfig
) -> Plan:
    written = writer.finish(packer)
    return Plan(
        digest=plan_digest(inputs, written.contents),
        names=tuple(source.mix.name for source in writer.sources),
        steps=(len(written.columns["offsets"]) - 1) // stage.global_batch_size,
        packs_per_step=stage.global_batch_size,
        sequence_length=stage.sequence_length,
        document_multiple=stage.document_multiple,
        **written.columns,
        refused={source.mix.name: len(source.mix.refused) for source in writer.sources},
        report=written.report,
        inputs=inputs,
        contents=written.contents,
    )
