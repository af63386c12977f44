"""The order of a whole run as a pure function of (manifests, weights, seed, stage).

Position in a run is (plan digest, step). Replica r of R takes packs [r::R] of each step's packs;
nothing else influences the order: not workers, not ranks, not buffers.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conf.schema.stage import StageConfig
from data_shards.manifest import Manifest
from data_shards.mixture import MixSource, draws, every_sample, positive
from data_shards.packing import OPEN_PACKS, PackLimits, pack_samples

ALGORITHM = 1  # raise it when the same inputs would give another order
MAX_REFUSED = 0.01  # share of samples that may be too long


class PlanError(ValueError):
    """No plan can be made; the message says what to change."""


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
        refused: samples of each data set that are too large for any pack.
        report: figures for people: efficiency, shares, epochs of each data set.
    """

    digest: str
    names: tuple[str, ...]
    steps: int
    packs_per_step: int
    sequence_length: int
    document_multiple: int
    offsets: np.ndarray
    samples: np.ndarray
    refused: Mapping[str, int]
    report: Mapping[str, Any]

    def packs(self, step: int, rank: int = 0, size: int = 1) -> list[np.ndarray]:
        """The packs of replica `rank` of `size` at `step`, each int32 [samples, 2].

        Raises:
            PlanError: a step outside the plan, or replicas that do not divide the global batch.
        """
        if not 0 <= step < self.steps:
            raise PlanError(f"step {step} is outside the plan's {self.steps} steps")
        if self.packs_per_step % size:
            raise PlanError(
                f"stage.global_batch_size={self.packs_per_step} is not a multiple of the "
                f"{size} data-parallel replicas; change it or parallel"
            )
        first = step * self.packs_per_step
        numbers = range(first + rank, first + self.packs_per_step, size)
        return [self.samples[self.offsets[n] : self.offsets[n + 1]] for n in numbers]


def build_plan(
    manifests: Mapping[str, Manifest], weights: Mapping[str, float], stage: StageConfig
) -> Plan:
    """The plan of one stage.

    `stage.steps` counts steps; `stage.epochs` counts passes over as many samples as the weighted
    data sets hold together, rounded up to whole steps. Every step is full.

    Args:
        manifests: data sets by name; those with a positive weight are used.
        weights: share of samples of each.

    Raises:
        PlanError: nothing to draw from, data sets built for different tokenizers, pairs where the
            objective wants samples, or more than 1 % of the samples too long.
    """
    chosen, sources, refused = _sources(manifests, weights, stage)
    if stage.steps is not None:
        goal: dict[str, int] = {"target": stage.steps * stage.global_batch_size}
    else:
        assert stage.epochs is not None
        wanted = math.ceil(stage.epochs * sum(len(source.rows) for source in sources))
        goal = {"wanted": wanted, "multiple": stage.global_batch_size}
    packs, drawn = _pack(chosen, draws(sources, stage.seed), stage, **goal)
    steps = len(packs) // stage.global_batch_size
    return _plan("training", chosen, weights, stage, packs, drawn, steps, refused)


def sequential_plan(
    manifests: Mapping[str, Manifest], weights: Mapping[str, float], stage: StageConfig
) -> Plan:
    """Every sample that `build_plan` could draw, exactly once, in the order of the manifests.

    The last step is filled up with empty packs. Raises as `build_plan`.
    """
    chosen, sources, refused = _sources(manifests, weights, stage)
    packs, drawn = _pack(chosen, iter([every_sample(sources)]), stage)
    steps = math.ceil(len(packs) / stage.global_batch_size)
    packs += [[] for _ in range(steps * stage.global_batch_size - len(packs))]
    return _plan("sequential", chosen, weights, stage, packs, drawn, steps, refused)


def padded_tokens(manifest: Manifest, multiple: int) -> np.ndarray:
    """int64 [n]: tokens of each sample in a pack, its documents padded to `multiple`."""

    def pad(tokens: np.ndarray) -> np.ndarray:
        return -(-tokens.astype(np.int64) // multiple) * multiple

    return pad(manifest.tokens) + pad(manifest.tokens_rejected)


def _sources(
    manifests: Mapping[str, Manifest], weights: Mapping[str, float], stage: StageConfig
) -> tuple[list[Manifest], list[MixSource], dict[str, int]]:
    used = positive(weights)
    if not used:
        raise PlanError(f"data.mix.{stage.name} draws from no source; give one a positive weight")
    missing = sorted(set(used) - set(manifests))
    if missing:
        raise PlanError(f"no manifest for {', '.join(missing)}; build the shards (make shards)")
    chosen = [manifests[name] for name in used]
    _check_alike(chosen, stage)
    sources, refused = [], {}
    for (name, weight), manifest in zip(used.items(), chosen, strict=True):
        fits = padded_tokens(manifest, stage.document_multiple) <= stage.sequence_length
        if stage.max_tiles_per_pack is not None:
            fits &= manifest.tiles <= stage.max_tiles_per_pack
        rows = np.flatnonzero(fits)
        refused[name] = len(manifest) - len(rows)
        sources.append(MixSource(name, rows, weight))
    _check_refused(chosen, sources, refused, stage)
    return chosen, sources, refused


def _check_alike(chosen: list[Manifest], stage: StageConfig) -> None:
    first = chosen[0].info
    wants_pairs = stage.objective == "dpo"
    for manifest in chosen:
        info = manifest.info
        for what in ("tokenizer_digest", "geometry_digest", "pillow"):
            if getattr(info, what) != getattr(first, what):
                raise PlanError(
                    f"{manifest.path} and {chosen[0].path} differ in {what}; build both again "
                    "with the same tokenizer, model and Pillow (make shards)"
                )
        if info.preference != wants_pairs:
            holds = "preference pairs" if info.preference else "plain samples"
            raise PlanError(
                f"{manifest.path} holds {holds}, but stage.objective={stage.objective}; change "
                f"data.mix.{stage.name}"
            )


def _check_refused(
    chosen: list[Manifest], sources: list[MixSource], refused: dict[str, int], stage: StageConfig
) -> None:
    total = sum(len(manifest) for manifest in chosen)
    empty = [source.name for source in sources if not len(source.rows)]
    if not empty and sum(refused.values()) <= MAX_REFUSED * total:
        return
    longest = max(int(padded_tokens(m, stage.document_multiple).max()) for m in chosen)
    counts = ", ".join(f"{name}: {count}" for name, count in refused.items() if count)
    tiles = ""
    if stage.max_tiles_per_pack is not None:
        most = max(int(manifest.tiles.max()) for manifest in chosen)
        tiles = f" and stage.max_tiles_per_pack={stage.max_tiles_per_pack} (most tiles: {most})"
    raise PlanError(
        f"{sum(refused.values())} of {total} samples ({counts}) do not fit "
        f"stage.sequence_length={stage.sequence_length} (longest: {longest}){tiles}; raise the "
        f"limit, lower model.max_tiles, or leave the source out of data.mix.{stage.name}"
    )


def _pack(
    chosen: list[Manifest], chunks: Iterator[np.ndarray], stage: StageConfig, **goal: int
) -> tuple[list[list[int]], np.ndarray]:
    """Packs of positions, and what was drawn at each position: int64 [n, 2]."""
    tokens = [padded_tokens(manifest, stage.document_multiple) for manifest in chosen]
    drawn: list[np.ndarray] = []

    def sizes() -> Iterator[tuple[int, int]]:
        for chunk in chunks:
            drawn.append(chunk)
            columns = np.empty((len(chunk), 2), np.int64)
            for which, manifest in enumerate(chosen):
                mine = np.flatnonzero(chunk[:, 0] == which)
                columns[mine, 0] = tokens[which][chunk[mine, 1]]
                columns[mine, 1] = manifest.tiles[chunk[mine, 1]]
            yield from map(tuple, columns.tolist())

    limits = PackLimits(stage.sequence_length, stage.max_tiles_per_pack, OPEN_PACKS, stage.packing)
    packs = pack_samples(sizes(), limits, **goal)
    return packs, np.concatenate(drawn)


def _plan(
    kind: str,
    chosen: list[Manifest],
    weights: Mapping[str, float],
    stage: StageConfig,
    packs: list[list[int]],
    drawn: np.ndarray,
    steps: int,
    refused: dict[str, int],
) -> Plan:
    counts = np.fromiter((len(pack) for pack in packs), np.int64, len(packs))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    order = np.fromiter((p for pack in packs for p in pack), np.int64, int(offsets[-1]))
    samples = drawn[order].astype(np.int32)
    used = positive(weights)
    inputs = {
        "algorithm": ALGORITHM,
        "kind": kind,
        "manifests": [manifest.info.digest for manifest in chosen],
        "tokenizer": chosen[0].info.tokenizer_digest,
        "geometry": chosen[0].info.geometry_digest,
        "pillow": chosen[0].info.pillow,
        "weights": used,
        "open_packs": OPEN_PACKS,
        "stage": {
            name: getattr(stage, name)
            for name in (
                "seed", "steps", "epochs", "sequence_length", "global_batch_size", "packing",
                "document_multiple", "max_tiles_per_pack",
            )
        },
    }  # fmt: skip
    # The content too: NumPy does not promise the same permutations in every version.
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    digest.update(offsets.astype("<i8").tobytes())
    digest.update(samples.astype("<i4").tobytes())
    return Plan(
        digest=digest.hexdigest(),
        names=tuple(used),
        steps=steps,
        packs_per_step=stage.global_batch_size,
        sequence_length=stage.sequence_length,
        document_multiple=stage.document_multiple,
        offsets=offsets,
        samples=samples,
        refused=refused,
        report=_report(chosen, list(used), samples, len(packs), stage),
    )


def _report(
    chosen: list[Manifest], names: list[str], samples: np.ndarray, packs: int, stage: StageConfig
) -> dict[str, Any]:
    """Figures of a plan, ready for JSON."""
    by_source, tokens, targets, tiles = {}, 0, 0, 0
    for which, (name, manifest) in enumerate(zip(names, chosen, strict=True)):
        rows = samples[samples[:, 0] == which, 1]
        both = manifest.tokens[rows].astype(np.int64) + manifest.tokens_rejected[rows]
        tokens += int(both.sum())
        targets += int(manifest.target_tokens[rows].sum(dtype=np.int64))
        tiles += int(manifest.tiles[rows].sum(dtype=np.int64))
        by_source[name] = {
            "samples": len(rows),
            "share": len(rows) / max(len(samples), 1),
            "epochs": len(rows) / len(manifest),
            "tokens": int(both.sum()),
        }
    return {
        "packs": packs,
        "samples": len(samples),
        "tokens": tokens,
        "target_tokens": targets,
        "tiles": tiles,
        "efficiency": tokens / max(packs * stage.sequence_length, 1),
        "sources": by_source,
    }
