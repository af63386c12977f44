"""One pack by the manifests of a stage's data sets, without planning or packing them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from conf.schema import StageConfig
from conf.schema.errors import ConfigError
from data_shards.manifest import read_manifest
from tools.plan.workload import FILL, Row

COLUMNS = ("tokens", "tokens_rejected", "target_tokens", "tiles")
MOST_ROWS = 1_000_000  # of a manifest that are looked at, evenly spread
DEVIATIONS = 5.0  # above the mean: the fullest of a hundred thousand packs and more


def row_from_manifests(
    paths: Mapping[str, Path],
    weights: Mapping[str, float],
    stage: StageConfig,
    weigh_by: str = "samples",
) -> Row:
    """Means over the weighted data sets; the pack with most tiles by their spread.

    Args:
        weigh_by: what the weights are shares of, samples or tokens.

    Raises:
        ConfigError: a manifest that is not one.
    """
    sets = {name: _columns(path) for name, path in paths.items()}
    parts = []
    for name, columns in sets.items():
        total = float(len(columns["tokens"]))
        if weigh_by == "tokens":
            total = float((columns["tokens"] + columns["tokens_rejected"]).sum())
        parts.append(np.full(len(columns["tokens"]), weights[name] / total))
    share = np.concatenate(parts)
    tokens, rejected, targets, tiles = (
        np.concatenate([columns[name] for columns in sets.values()]) for name in COLUMNS
    )
    both = _padded(tokens, stage.document_multiple) + _padded(rejected, stage.document_multiple)
    fits = (both <= stage.sequence_length) & (both > 0)
    if stage.max_tiles_per_pack is not None:
        fits &= tiles <= stage.max_tiles_per_pack
    if not fits.any():
        raise ConfigError(
            f"no sample of {', '.join(paths)} fits stage.sequence_length={stage.sequence_length}; "
            "raise it"
        )
    share = np.where(fits, share, 0.0)
    share /= share.sum()

    def mean(values: np.ndarray) -> float:
        return float((share * values).sum())

    size = mean(both)
    per_pack = FILL * stage.sequence_length / size if stage.packing else 1.0
    # Two documents of a pair look at their own tokens only.
    squares = mean(tokens.astype(float) ** 2 + rejected.astype(float) ** 2)
    spread = float(np.sqrt(mean((tiles - both * mean(tiles) / size) ** 2) * per_pack))
    most = per_pack * mean(tiles) + DEVIATIONS * spread
    most = max(most, float(tiles[fits].max()))
    if stage.max_tiles_per_pack is not None:
        most = min(most, float(stage.max_tiles_per_pack))
    if stage.max_tiles_over_mean is not None:
        over = stage.max_tiles_over_mean * stage.sequence_length / size * mean(tiles)
        most = min(most, max(over, float(tiles[fits].max())))
    return Row(
        tokens=stage.sequence_length,
        real=per_pack * size,
        document=squares / max(mean(tokens + rejected), 1.0),
        targets=per_pack * mean(targets),
        tiles=per_pack * mean(tiles),
        most_tiles=most,
        samples=per_pack,
        imbalance=1.0 + 0.5 * spread / max(per_pack * mean(tiles), 1.0),
        source=f"{len(paths)} manifests: ",
    )


def count_samples(paths: Sequence[Path]) -> int:
    """Rows of all manifests together."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _columns(path: Path) -> dict[str, np.ndarray]:
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not a manifest: {error}") from error
    every = -(-len(manifest) // MOST_ROWS)
    return {name: getattr(manifest, name)[::every].astype(np.int64) for name in COLUMNS}


def _padded(tokens: np.ndarray, multiple: int) -> np.ndarray:
    return -(-tokens // multiple) * multiple
