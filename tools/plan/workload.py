"""What one pack holds: from the manifests where the data set is there, else stated assumptions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from conf.schema import Config
from conf.schema.errors import ConfigError
from models.anyres import AnyresGeometry

FILL = 0.98  # data_shards/packing.py: 98-99 % of a pack is samples
LOOSE_FILL = 0.92  # assumed, where a pack holds two or three samples
SETTINGS = ("document", "tiles", "targets", "fill", "imbalance", "samples")


@dataclass(frozen=True)
class Row:
    """The tokens of one micro-batch of one replica (or one pack), means over a run.

    Attributes:
        tokens: length of the row, padding included.
        real: tokens of samples.
        document: tokens of a document, weighted by tokens: what a token's attention looks at is
            half of it.
        targets: tokens with a loss.
        tiles: tiles through the vision tower.
        most_tiles: in the fullest row, for memory.
        samples: samples (pairs) of a pack.
        imbalance: attention and vision of the slowest replica beside the mean one.
        source: where this comes from.
    """

    tokens: float
    real: float
    document: float
    targets: float
    tiles: float = 0.0
    most_tiles: float = 0.0
    samples: float = 1.0
    imbalance: float = 1.0
    source: str = ""

    @property
    def pairs(self) -> float:
        """(query, key) pairs that causal attention looks at."""
        return self.real * (self.document + 1) / 2

    def times(self, packs: int) -> "Row":
        """The row of `packs` packs laid end to end."""
        if packs == 1:
            return self
        return replace(
            self,
            tokens=self.tokens * packs,
            real=self.real * packs,
            targets=self.targets * packs,
            tiles=self.tiles * packs,
            # The fullest packs do not meet in one row.
            most_tiles=max(self.most_tiles, self.most_tiles + (packs - 1) * self.tiles),
            samples=self.samples * packs,
        )


@dataclass(frozen=True)
class _Assumed:
    """Of a stage without manifests; none of it is published."""

    image: tuple[int, int]  # height and width, pixels
    text: int  # tokens beside each image
    visual: float  # share of the tokens that are image tokens
    targets: float  # share of the tokens with a loss
    shared: int  # documents that share one set of tiles
    imbalance: float  # attention and vision of the slowest replica beside the mean
    samples: int  # of the stage; 0: not known


_ASSUMED = {
    # Photographs of a megapixel with a caption (PD12M's are that large or larger).
    1: _Assumed((768, 1024), 80, 0.98, 0.02, 1, 1.05, 500_000),  # 500k pairs: published
    # Photographs, documents, charts and 15 % text.
    2: _Assumed((640, 800), 500, 0.75, 0.15, 1, 1.15, 0),
    # Both answers to the same pictures. 100K to 1M pairs are published; their geometric mean.
    3: _Assumed((640, 800), 500, 0.80, 0.12, 2, 1.15, 316_000),
}


def row_of(config: Config, settings: Mapping[str, float] | None = None) -> Row:
    """One pack of the stage.

    Args:
        settings: what the command line says of `SETTINGS`; it wins over manifest and assumption.

    Raises:
        ConfigError: a manifest that cannot be read, or a setting out of range.
    """
    given = dict(settings or {})
    row = _from_manifests(config) or _assumed(config)
    return _override(row, config, given)


def _assumed(config: Config) -> Row:
    stage, facts = config.stage, _ASSUMED[config.stage.number]
    geometry = AnyresGeometry.from_model(config.model)
    image = geometry.n_tokens(*facts.image)
    document = min(float(image + facts.text), stage.sequence_length / facts.shared)
    sample = facts.shared * document
    if not stage.packing:
        fill = sample / stage.sequence_length
    elif sample > stage.sequence_length / 2:  # one sample a pack
        fill = sample / stage.sequence_length
    else:
        fill = LOOSE_FILL if sample > stage.sequence_length / 4 else FILL
    real = min(fill, 1.0) * stage.sequence_length
    tiles = real * facts.visual / facts.shared / image * geometry.n_tiles(*facts.image)
    most = float(stage.max_tiles_per_pack or 1.35 * tiles)
    height, width = facts.image
    return Row(
        tokens=stage.sequence_length,
        real=real,
        document=document,
        targets=facts.targets * real,
        tiles=min(tiles, most),
        most_tiles=most,
        samples=max(1.0, real / sample),
        imbalance=facts.imbalance,
        source=f"assumed, no manifest (images of {height} x {width}): ",
    )


def _from_manifests(config: Config) -> Row | None:
    stage = config.stage
    weights = config.data.shares(stage.name)
    paths = {name: Path(config.data.root) / name / "manifest.parquet" for name in weights}
    if not paths or not all(path.is_file() for path in paths.values()):
        return None
    from tools.plan.manifest_row import row_from_manifests  # NumPy and Arrow, where there is data

    return row_from_manifests(paths, weights, stage, config.data.weigh_by)


def _override(row: Row, config: Config, given: Mapping[str, float]) -> Row:
    for name, value in given.items():
        if not value > 0:
            raise ConfigError(f"{name}={value}: it must be positive")
    if given.get("fill", 0.5) > 1 or given.get("targets", 0.5) > 1:
        raise ConfigError("fill= and targets= are shares of the tokens, at most 1")
    length = config.stage.sequence_length
    real = given.get("fill", row.real / length) * length
    document = min(given.get("document", row.document), length)
    share = given.get("targets", row.targets / max(row.real, 1.0))
    scale = real / max(row.real, 1.0)
    samples = row.samples * scale * row.document / document
    tiles = given.get("tiles", row.tiles * scale)
    changed = [f"{name}={value:g}" for name, value in given.items() if name in SETTINGS]
    note = f"; given: {' '.join(changed)}" if changed else ""
    return replace(
        row,
        real=real,
        document=document,
        targets=share * real,
        tiles=tiles,
        most_tiles=max(row.most_tiles, tiles),
        samples=max(samples, 1.0),
        imbalance=given.get("imbalance", row.imbalance),
        source=row.source + _facts(real, length, document, tiles, share) + note,
    )


def _facts(real: float, length: float, document: float, tiles: float, share: float) -> str:
    return (
        f"{real / length:.0%} of a pack filled, documents of {document:,.0f} tokens, "
        f"{tiles:.1f} tiles a pack, {share:.0%} of the tokens with a loss"
    )


def steps_of(config: Config, row: Row, settings: Mapping[str, float] | None = None) -> int:
    """Optimizer steps of the stage: `stage.steps`, or what its epochs come to."""
    stage = config.stage
    if stage.steps is not None:
        return stage.steps
    samples = (settings or {}).get("samples") or row_samples(config)
    packs = (stage.epochs or 0) * samples / row.samples
    return max(1, -(-int(packs) // stage.global_batch_size))


def row_samples(config: Config) -> float:
    """Samples of the stage's mixture, by the manifests or assumed."""
    stage = config.stage
    root = Path(config.data.root)
    paths = [root / name / "manifest.parquet" for name in config.data.drawn(stage.name)]
    if paths and all(path.is_file() for path in paths):
        from tools.plan.manifest_row import count_samples

        return float(count_samples(paths))
    return float(_ASSUMED[stage.number].samples)
