"""One pack by the manifests of a stage's data sets, without planning or packing them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from conf.schema import StageConfig
from conf.schema.errors import ConfigError
from tools.plan.workload import FILL, Row

COLUMNS = ("tokens", "tokens_rejected", "target_tokens", "target_tokens_rejected", "tiles")
DEVIATIONS = 5.0  # above the mean: the fullest of a hundred thousand packs and more


def row_from_manifests(
    paths: Mapping[str, Path], weights: Mapping[str, float], stage: StageConfig
) -> Row:
    """Means over the weighted data sets; the pack with most tiles by their spread.

    Raises:
        ConfigError: a manifest that is not one.
    """
    sets = [_columns(path) for path in paths.values()]
    # Weights are shares of samples (data_shards/mixture.py).
    share = np.concatenate(
        [
            np.full(len(columns["tokens"]), weights[name] / max(len(columns["tokens"]), 1))
            for name, columns in zip(paths, sets, strict=True)
        ]
    )
    tokens, rejected, target, target_rejected, tiles = (
        np.concatenate([columns[name] for columns in sets]) for name in COLUMNS
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
    return Row(
        tokens=stage.sequence_length,
        real=per_pack * size,
        document=squares / max(mean(tokens + rejected), 1.0),
        targets=per_pack * mean(target + target_rejected),
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
        table = pq.read_table(path, columns=list(COLUMNS))
        return {name: table[name].to_numpy().astype(np.int64) for name in COLUMNS}
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is not a manifest ({reason}); build the data set again (make shards)"
        ) from error


def _padded(tokens: np.ndarray, multiple: int) -> np.ndarray:
    return -(-tokens // multiple) * multiple
