"""Where samples come from, how shards are built, how sources are mixed per stage."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from conf.schema.errors import ConfigError

FORMATS = ("parquet", "jsonl", "json", "webdataset")
LAYOUTS = ("auto", "messages", "conversations", "texts", "caption", "question")
FIELDS = ("messages", "images", "chosen", "rejected", "question", "answer", "caption", "licence")
WEIGH_BY = ("samples", "tokens")


@dataclass
class SourceConfig:
    """One source: its input files, how a row holds a chat, and what is asked of its samples."""

    input: str  # glob of the files
    format: str = "parquet"  # parquet, jsonl, json (one list of objects, as LLaVA's), webdataset
    # How a row holds the chat. messages: role and content. conversations: LLaVA's from and value.
    # texts: FineVision's user and assistant. caption: an image and its text, asked for by one of
    # `prompts`. question: a question with its answer, or with chosen and rejected (MMPR).
    # auto: whichever fits the columns.
    layout: str = "auto"
    licence: str = "unknown"  # where the row does not say
    preference: bool = False  # its samples carry a chosen and a rejected answer
    # our field (FIELDS) -> their column, for fields named otherwise; a dot reaches into a struct
    columns: dict[str, str] = field(default_factory=dict)
    # Where image paths start: a folder, or InternVL's meta.json, which names one for each file (as
    # MMPR has it); default: the source file's folder.
    image_root: Optional[str] = None
    prompts: list[str] = field(default_factory=list)  # for captions; one is drawn for each sample
    # WebDataset only: leave the archives where they are, index them and never rewrite.
    in_place: bool = False
    # Drop a sample whose images another one has, whatever the text (captions scraped twice).
    unique_images: bool = False

    def check(self, name: str, group: str = "sources") -> None:
        where = f"data.{group}.{name}"
        if self.format not in FORMATS:
            raise ConfigError(f"{where}.format={self.format!r} is none of {', '.join(FORMATS)}")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"{where}.layout={self.layout!r} is none of {', '.join(LAYOUTS)}")
        unknown = sorted(set(self.columns) - set(FIELDS))
        if unknown:
            raise ConfigError(
                f"{where}.columns names {', '.join(unknown)}; the fields are {', '.join(FIELDS)}"
            )
        if self.in_place and self.format != "webdataset":
            raise ConfigError(
                f"{where}.in_place=true needs format=webdataset; {self.format} files hold no "
                "shards, so they are written anew"
            )
        if self.layout == "caption" and not self.prompts:
            raise ConfigError(f"{where}.layout=caption needs prompts, the questions asked")


@dataclass
class ImageLimits:
    """What an image may be; others are refused with their sample."""

    max_pixels: int = 50_000_000
    min_side: int = 16  # px
    max_aspect: float = 20.0  # longer side over shorter side
    max_bytes: int = 64 << 20  # encoded

    def check(self) -> None:
        if min(self.max_pixels, self.min_side, self.max_bytes) < 1 or self.max_aspect < 1:
            raise ConfigError(f"data.images={self}: every limit must be at least 1")
        if self.min_side < 4:
            raise ConfigError(
                f"data.images.min_side={self.min_side}: under 4 px transformers may take the "
                "height for the channels; use at least 4"
            )


@dataclass
class DuplicatesConfig:
    """Which samples count as seen before; the first one, in the order of data.sources, stays."""

    exact: bool = True  # same images (bytes or pixels) and same text
    # Images are alike where at most this many of the 256 bits of their difference hashes differ;
    # null: only where they are equal byte for byte.
    near_bits: Optional[int] = 6
    across_sources: bool = True
    # An image alike to one of these sets, or a text-only sample with the same text, is dropped.
    evaluation: dict[str, SourceConfig] = field(default_factory=dict)

    def check(self) -> None:
        if self.near_bits is not None and not 0 <= self.near_bits <= 7:
            raise ConfigError(
                f"data.duplicates.near_bits={self.near_bits} is not in 0..7: beyond, the search "
                "could miss some"
            )
        for name, source in self.evaluation.items():
            source.check(name, "duplicates.evaluation")


@dataclass
class PhaseConfig:
    """A part of a stage with a mixture of its own."""

    until: float  # share of the stage's samples, in (0, 1]; the last one is 1
    weights: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, where: str, value: Any) -> "PhaseConfig":
        """A phase from plain values; ConfigError naming `where` on anything else."""
        if isinstance(value, PhaseConfig):
            value = {"until": value.until, "weights": value.weights}
        if not isinstance(value, Mapping) or not isinstance(value.get("weights", {}), Mapping):
            raise ConfigError(f"{where}={value!r} is no phase; write {{until: END, weights: {{}}}}")
        unknown = sorted(map(str, set(value) - {"until", "weights"}))
        if unknown or "until" not in value:
            raise ConfigError(
                f"{where} has {', '.join(map(str, value))}; a phase has until and weights"
            )
        weights = value.get("weights", {})
        return cls(
            until=_weight(where, "until", value["until"]),
            weights={name: _weight(f"{where}.weights", name, w) for name, w in weights.items()},
        )


@dataclass
class DataConfig:
    """`root/NAME/` holds the shards and the manifest of source NAME."""

    root: str
    tokenizer: str  # directory with tokenizer.json, tokenizer_config.json, chat_template.jinja
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # Stage name -> source name -> weight, a float. Any: OmegaConf would refuse the whole numbers
    # among the weights.
    mix: dict[str, dict[str, Any]] = field(default_factory=dict)
    weigh_by: str = "samples"  # what the weights are shares of: samples or tokens
    # Stage name -> phase name -> phase, a PhaseConfig; they replace the stage's mix. Any: OmegaConf
    # would refuse a mapping given on the command line.
    curriculum: dict[str, dict[str, Any]] = field(default_factory=dict)
    shard_bytes: int = 1 << 30
    # Rows that are examined and written as one unit of work; part of what the shards are.
    block_rows: int = 20_000
    images: ImageLimits = field(default_factory=ImageLimits)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    variety_model: Optional[str] = None  # a fastText file that tells pt-PT from pt-BR
    build_workers: int = 1
    load_workers: int = 1
    max_masked: int = 100  # samples with bad bytes that a replica may mask before training stops
    shuffle_shards: int = 8  # samples are shuffled among those of this many shards

    def __post_init__(self) -> None:
        self.mix = {
            stage: {
                name: _weight(f"data.mix.{stage}", name, weight) for name, weight in weights.items()
            }
            for stage, weights in self.mix.items()
        }
        self.curriculum = {
            stage: {
                name: PhaseConfig.read(f"data.curriculum.{stage}.{name}", phase)
                for name, phase in phases.items()
            }
            for stage, phases in self.curriculum.items()
        }

    def phases(self, stage: str) -> list[PhaseConfig]:
        """What a stage draws from, phase after phase; one where it has no curriculum."""
        if stage in self.curriculum:
            return sorted(self.curriculum[stage].values(), key=lambda phase: phase.until)
        return [PhaseConfig(1.0, self.mix[stage])] if stage in self.mix else []

    def drawn(self, stage: str) -> list[str]:
        """Names of the sources that a stage draws from at all, sorted."""
        phases = self.phases(stage)
        return sorted({name for phase in phases for name, w in phase.weights.items() if w > 0})

    def shares(self, stage: str) -> dict[str, float]:
        """Source -> its part of what a stage draws over all phases; they add up to 1."""
        found: dict[str, float] = dict.fromkeys(self.drawn(stage), 0.0)
        begin = 0.0
        for phase in self.phases(stage):
            total = math.fsum(phase.weights.values())
            for name in found:
                found[name] += (phase.until - begin) * phase.weights.get(name, 0.0) / total
            begin = phase.until
        return found

    def check(self) -> None:
        for name, source in self.sources.items():
            source.check(name)
        self.images.check()
        self.duplicates.check()
        if self.weigh_by not in WEIGH_BY:
            raise ConfigError(f"data.weigh_by={self.weigh_by!r} is none of {', '.join(WEIGH_BY)}")
        for number in ("shard_bytes", "block_rows", "build_workers", "shuffle_shards"):
            if getattr(self, number) < 1:
                raise ConfigError(f"data.{number}={getattr(self, number)}: at least 1 is needed")
        for number in ("load_workers", "max_masked"):
            if getattr(self, number) < 0:
                raise ConfigError(f"data.{number}={getattr(self, number)}: at least 0 is needed")
        for stage, weights in self.mix.items():
            self._check_weights(f"data.mix.{stage}", weights)
        for stage, phases in self.curriculum.items():
            where = f"data.curriculum.{stage}"
            ends = [phase.until for phase in phases.values()]
            if not ends or max(ends) != 1 or min(ends) <= 0 or len(set(ends)) != len(ends):
                raise ConfigError(
                    f"{where}: its phases end at {ends}; each needs an end of its own in (0, 1], "
                    "the last 1"
                )
            for name, phase in phases.items():
                self._check_weights(f"{where}.{name}.weights", phase.weights)

    def _check_weights(self, where: str, weights: dict[str, Any]) -> None:
        unknown = sorted(set(weights) - set(self.sources))
        if unknown:
            raise ConfigError(
                f"{where} names {', '.join(unknown)}, which data.sources does not have"
            )
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ConfigError(f"{where}={dict(weights)}: weights must be >= 0 with a positive sum")


def _weight(where: str, name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"{where}.{name}={weight!r} is not a number")
    return float(weight)
