"""Which sample comes next: sources mixed by weight, each a sequence of reshuffled epochs.

Pure integer arithmetic on the seed: no state, no generator shared between sources.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_FIRST_CHUNK, _LARGEST_CHUNK = 1 << 10, 1 << 16  # draws made at a time; the order is the same
# 2^64 divided by the golden ratio: multiples of it modulo 2^64 are the best-spread sequence
# (Weyl 1916), so after N draws each source is within a few samples of its share of N.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class MixSource:
    """One source of a mixture."""

    name: str
    rows: np.ndarray  # int64, the manifest rows that may be drawn
    weight: float  # share of the draws, in proportion to the other weights


def philox(seed: int, *labels: str | int) -> np.random.Generator:
    """Philox generator (Salmon et al. 2011) keyed by a hash of seed and labels."""
    text = "\0".join(map(str, (seed, *labels)))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def draws(sources: Sequence[MixSource], seed: int) -> Iterator[np.ndarray]:
    """Endless draws, in chunks of int64 [n, 2]: (source number, manifest row).

    The k-th draw of a source is element k mod n of its (k div n)-th permutation.
    """
    weights = np.array([source.weight for source in sources], np.float64)
    # Upper ends of each source's share of the 64-bit circle; the last end is the circle's.
    shares = np.cumsum(weights / weights.sum())[:-1]
    ends = np.minimum(shares * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
    start = philox(seed, "mixture").integers(0, 2**64, dtype=np.uint64)
    epochs = [_Epochs(source, seed) for source in sources]
    position, size = 0, _FIRST_CHUNK
    while True:
        index = np.arange(position, position + size, dtype=np.uint64)
        points = start + index * _GOLDEN  # modulo 2^64
        number = np.searchsorted(ends, points, side="right")
        chunk = np.empty((size, 2), np.int64)
        chunk[:, 0] = number
        for which, source in enumerate(epochs):
            mine = np.flatnonzero(number == which)
            chunk[mine, 1] = source.take(len(mine))
        yield chunk
        position, size = position + size, min(2 * size, _LARGEST_CHUNK)


def every_sample(sources: Sequence[MixSource]) -> np.ndarray:
    """Every row of every source once, in order: int64 [n, 2] as in `draws`."""
    parts = [
        np.stack([np.full(len(source.rows), which, np.int64), source.rows], axis=1)
        for which, source in enumerate(sources)
    ]
    return np.concatenate(parts)


def positive(weights: Mapping[str, float]) -> dict[str, float]:
    """The sources that are drawn at all, in order of name (the order in the file is no choice)."""
    return {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}


class _Epochs:
    """The rows of one source, epoch after epoch, each in its own order."""

    def __init__(self, source: MixSource, seed: int):
        self._source, self._seed = source, seed
        self._epoch = -1
        self._left = np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, int64."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            if not len(self._left):
                self._epoch += 1
                generator = philox(self._seed, self._source.name, self._epoch)
                self._left = self._source.rows[generator.permutation(len(self._source.rows))]
            parts.append(self._left[:count])
            self._left = self._left[count:]
            count -= len(parts[-1])
        return np.concatenate(parts)
