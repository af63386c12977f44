"""Where samples come from, how shards are built, how sources are mixed per stage."""

import math
from dataclasses import dataclass, field
from typing import Any

from conf.schema.errors import ConfigError

FORMATS = ("parquet", "jsonl")


@dataclass
class SourceConfig:
    """One source: its input files and the column names that differ from ours."""

    input: str  # glob of Parquet or JSONL files
    format: str = "parquet"
    licence: str = "unknown"
    preference: bool = False  # its samples carry a chosen and a rejected answer
    # our field -> their column, for fields named otherwise: messages, images, chosen, rejected
    columns: dict[str, str] = field(default_factory=dict)

    def check(self, name: str) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"data.sources.{name}.format={self.format!r} is none of {', '.join(FORMATS)}"
            )


@dataclass
class DataConfig:
    """`root/NAME/` holds the shards and the manifest of source NAME."""

    root: str
    tokenizer: str  # directory with tokenizer.json, tokenizer_config.json, chat_template.jinja
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # Stage name -> source name -> weight (share of samples), a float. Any: OmegaConf would refuse
    # the whole numbers among the weights.
    mix: dict[str, dict[str, Any]] = field(default_factory=dict)
    shard_bytes: int = 1 << 30
    max_pixels: int = 50_000_000
    build_workers: int = 1
    load_workers: int = 1

    def __post_init__(self) -> None:
        self.mix = {
            stage: {name: _weight(stage, name, weight) for name, weight in weights.items()}
            for stage, weights in self.mix.items()
        }

    def check(self) -> None:
        for name, source in self.sources.items():
            source.check(name)
        for stage, weights in self.mix.items():
            unknown = sorted(set(weights) - set(self.sources))
            if unknown:
                raise ConfigError(
                    f"data.mix.{stage} names {', '.join(unknown)}, which data.sources does not have"
                )
            if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise ConfigError(
                    f"data.mix.{stage}={dict(weights)}: weights must be >= 0 with a positive sum"
                )


def _weight(stage: str, name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"data.mix.{stage}.{name}={weight!r} is not a number")
    return float(weight)
