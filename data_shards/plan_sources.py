"""What a plan draws from: the sources of a stage, what does not fit, the shares of each phase."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conf.schema.data import DataConfig
from conf.schema.stage import StageConfig
from data_shards.manifest import Manifest
from data_shards.mixture import MixPhase, MixSource, positive

MAX_REFUSED = 0.01  # share of samples that may be too long
FILL = 0.995  # of a pack is samples, about (docs/benchmarks/data.md)
SHORT = (0.05, 0.1)  # shares of samples that may count as short
_BIN = 16  # tokens
_ROWS = 1 << 20  # looked at together


class PlanError(ValueError):
    """No plan can be made; the message says what to change."""


@dataclass(frozen=True)
class PlanSource:
    """A data set of a plan: its manifest, and means over the samples that fit."""

    manifest: Manifest
    mix: MixSource
    tokens: float  # mean, padded to the document multiple
    tiles: float  # mean
    least_tokens: int
    least_tiles: int
    longest: int  # tokens of any sample, also one that does not fit
    most_tiles: int
    lengths: np.ndarray  # int64; samples of 0 to 15 tokens, of 16 to 31, ...


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with what its packs look like."""

    mix: MixPhase
    samples: float  # of a full pack
    tiles: float  # of a full pack
    short: tuple[int, ...]  # tokens; `SHORT` of the samples are shorter


def padded_tokens(manifest: Manifest, multiple: int, rows: slice | np.ndarray) -> np.ndarray:
    """int64: tokens of these samples in a pack, each document padded to `multiple`."""

    def pad(tokens: np.ndarray) -> np.ndarray:
        return -(-tokens[rows].astype(np.int64) // multiple) * multiple

    return pad(manifest.tokens) + pad(manifest.tokens_rejected)


def open_sources(
    manifests: Mapping[str, Manifest], data: DataConfig, stage: StageConfig
) -> list[PlanSource]:
    """The sources that any phase of the stage draws from, in order of name.

    Raises:
        PlanError: none, one without a manifest, data sets built for different tokenizers, pairs
            where the objective wants samples, or more than 1 % of the samples too long.
    """
    chosen = drawn_manifests(manifests, data, stage)
    _check_alike(list(chosen.values()), stage)
    sources = [_look_at(name, manifest, stage) for name, manifest in chosen.items()]
    _check_refused(sources, stage)
    return sources


def drawn_manifests(
    manifests: Mapping[str, Manifest], data: DataConfig, stage: StageConfig
) -> dict[str, Manifest]:
    """The manifests that any phase of the stage draws from, in order of name.

    Raises:
        PlanError: there is none, or one is not among `manifests`.
    """
    names = data.drawn(stage.name)
    if not names:
        raise PlanError(f"data.mix.{stage.name} draws from no source; give one a positive weight")
    missing = sorted(set(names) - set(manifests))
    if missing:
        raise PlanError(f"no manifest for {', '.join(missing)}; build the shards (make shards)")
    return {name: manifests[name] for name in names}


def plan_phases(
    sources: Sequence[PlanSource], data: DataConfig, stage: StageConfig, samples: float | None
) -> list[PlannedPhase]:
    """The phases of a stage, their ends in samples.

    Args:
        samples: of the whole stage; None: as many as fill `stage.steps`, by the mean lengths.
    """
    ends, shares = [], []
    for phase in data.phases(stage.name):
        weights = positive(phase.weights)
        parts = [weights.get(source.mix.name, 0.0) for source in sources]
        if data.weigh_by == "tokens":
            parts = [part / source.tokens for part, source in zip(parts, sources, strict=True)]
        shares.append(tuple(part / math.fsum(parts) for part in parts))
        ends.append(phase.until)
    if samples is None:
        assert stage.steps is not None
        samples = stage.steps * stage.global_batch_size
        if stage.packing:
            means = [_dot(row, [source.tokens for source in sources]) for row in shares]
            mean = _dot(np.diff([0.0, *ends]).tolist(), means)
            samples *= FILL * stage.sequence_length / mean
    limits = [*(math.floor(end * samples) for end in ends[:-1]), None]
    return [_phase(sources, row, limit, stage) for row, limit in zip(shares, limits, strict=True)]


def tile_limit(
    sources: Sequence[PlanSource], phase: PlannedPhase, stage: StageConfig
) -> int | None:
    """Most tiles of a pack in this phase; never less than one sample may have."""
    if stage.max_tiles_over_mean is None:
        return stage.max_tiles_per_pack
    most = max(source.most_tiles for source in sources)
    return max(math.floor(stage.max_tiles_over_mean * phase.tiles), most)


def every_source(sources: Sequence[PlanSource], stage: StageConfig) -> PlannedPhase:
    """A phase in which each sample comes as often as any other."""
    counts = [len(source.mix) for source in sources]
    return _phase(sources, tuple(count / sum(counts) for count in counts), None, stage)


def _phase(
    sources: Sequence[PlanSource], shares: tuple[float, ...], until: int | None, stage: StageConfig
) -> PlannedPhase:
    mean = _dot(shares, [source.tokens for source in sources])
    full = stage.sequence_length / mean if stage.packing else 1.0
    tiles = full * _dot(shares, [source.tiles for source in sources])
    shorter = np.zeros(len(sources[0].lengths))
    for share, source in zip(shares, sources, strict=True):
        shorter += share / len(source.mix) * np.cumsum(source.lengths)
    short = tuple(int(np.searchsorted(shorter, share)) * _BIN for share in SHORT)
    return PlannedPhase(MixPhase(shares, until), full, tiles, short)


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(first, second, strict=True))


def _look_at(name: str, manifest: Manifest, stage: StageConfig) -> PlanSource:
    refused = []
    lengths = np.zeros(stage.sequence_length // _BIN + 1, np.int64)
    total_tokens = total_tiles = longest = most = 0
    least_tokens = least_tiles = 1 << 62
    for first in range(0, len(manifest), _ROWS):
        rows = slice(first, first + _ROWS)
        tokens = padded_tokens(manifest, stage.document_multiple, rows)
        tiles = manifest.tiles[rows].astype(np.int64)
        fits = tokens <= stage.sequence_length
        if stage.max_tiles_per_pack is not None:
            fits &= tiles <= stage.max_tiles_per_pack
        refused.append(first + np.flatnonzero(~fits))
        longest, most = max(longest, int(tokens.max())), max(most, int(tiles.max()))
        tokens, tiles = tokens[fits], tiles[fits]
        if len(tokens):
            total_tokens, total_tiles = total_tokens + int(tokens.sum()), total_tiles + tiles.sum()
            least_tokens = min(least_tokens, int(tokens.min()))
            least_tiles = min(least_tiles, int(tiles.min()))
            lengths += np.bincount(tokens // _BIN, minlength=len(lengths))
        manifest.release()
    numbers = np.arange(len(manifest.info.shards) + 1)
    mix = MixSource(name, np.searchsorted(manifest.shard, numbers), np.concatenate(refused))
    kept = max(len(mix), 1)
    return PlanSource(
        manifest=manifest,
        mix=mix,
        tokens=max(total_tokens, 1) / kept,
        tiles=float(total_tiles) / kept,
        least_tokens=least_tokens,
        least_tiles=least_tiles,
        longest=longest,
        most_tiles=most,
        lengths=lengths,
    )


def _check_alike(chosen: Sequence[Manifest], stage: StageConfig) -> None:
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


def _check_refused(sources: Sequence[PlanSource], stage: StageConfig) -> None:
    refused = {source.mix.name: len(source.mix.refused) for source in sources}
    total = sum(len(source.manifest) for source in sources)
    if all(len(source.mix) for source in sources):
        if sum(refused.values()) <= MAX_REFUSED * total:
            return
    counts = ", ".join(f"{name}: {count}" for name, count in refused.items() if count)
    tiles = ""
    if stage.max_tiles_per_pack is not None:
        most = max(source.most_tiles for source in sources)
        tiles = f" and stage.max_tiles_per_pack={stage.max_tiles_per_pack} (most tiles: {most})"
    raise PlanError(
        f"{sum(refused.values())} of {total} samples ({counts}) do not fit "
        f"stage.sequence_length={stage.sequence_length} (longest: "
        f"{max(source.longest for source in sources)}){tiles}; raise the "
        f"limit, lower model.max_tiles, or leave the source out of data.mix.{stage.name}"
    )
