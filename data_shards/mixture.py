"""Which sample comes next: sources mixed by weight, each a sequence of reshuffled epochs.

Pure integer arithmetic on the seed: no state, no generator shared between sources. Memory is that
of a few shards' row numbers, however large the sources are.
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
    """One source of a mixture.

    Attributes:
        bounds: int64 [shards + 1]; the rows of shard s are bounds[s] to bounds[s + 1].
        refused: int64, in order; rows that are never drawn.
    """

    name: str
    bounds: np.ndarray
    refused: np.ndarray

    def __len__(self) -> int:
        """Rows that may be drawn."""
        return int(self.bounds[-1]) - len(self.refused)

    def rows(self, shards: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64, the rows of these shards that may be drawn."""
        parts = [np.arange(self.bounds[s], self.bounds[s + 1], dtype=np.int64) for s in shards]
        rows = np.concatenate([*parts, np.empty(0, np.int64)])
        if not len(self.refused):
            return rows
        place = np.minimum(np.searchsorted(self.refused, rows), len(self.refused) - 1)
        return rows[self.refused[place] != rows]


@dataclass(frozen=True)
class MixPhase:
    """A part of the draws with shares of its own."""

    shares: tuple[float, ...]  # of each source, by draws, in proportion to the others
    until: int | None  # draws, counted from the start of all; None: to the end


def philox(seed: int, *labels: str | int) -> np.random.Generator:
    """Philox generator (Salmon et al. 2011) keyed by a hash of seed and labels."""
    text = "\0".join(map(str, (seed, *labels)))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def draws(
    sources: Sequence[MixSource], phases: Sequence[MixPhase], seed: int, shuffle_shards: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Endless draws, in chunks: (phase number, int64 [n, 2] of source number and manifest row).

    A source goes through its epochs as `Epochs` says, whatever the shares.
    """
    start = philox(seed, "mixture").integers(0, 2**64, dtype=np.uint64)
    epochs = [Epochs(source, seed, shuffle_shards) for source in sources]
    position, size = 0, _FIRST_CHUNK
    for number, phase in enumerate(phases):
        weights = np.array(phase.shares, np.float64)
        drawn = np.flatnonzero(weights > 0)
        # Upper ends of each share of the 64-bit circle; the last end is the circle's.
        shares = np.cumsum(weights[drawn] / weights.sum())[:-1]
        ends = np.minimum(shares * 2.0**64, 2.0**64 - 2048).astype(np.uint64)
        while phase.until is None or position < phase.until:
            left = size if phase.until is None else min(size, phase.until - position)
            index = np.arange(position, position + left, dtype=np.uint64)
            points = start + index * _GOLDEN  # modulo 2^64
            chunk = np.empty((left, 2), np.int64)
            chunk[:, 0] = drawn[np.searchsorted(ends, points, side="right")]
            for which in drawn.tolist():
                mine = np.flatnonzero(chunk[:, 0] == which)
                chunk[mine, 1] = epochs[which].take(len(mine))
            yield number, chunk
            position, size = position + left, min(2 * size, _LARGEST_CHUNK)


def every_sample(sources: Sequence[MixSource]) -> Iterator[np.ndarray]:
    """Every row of every source once, in order, in chunks of int64 [n, 2] as in `draws`."""
    for which, source in enumerate(sources):
        for shard in range(len(source.bounds) - 1):
            rows = source.rows([shard])
            for first in range(0, len(rows), _LARGEST_CHUNK):
                part = rows[first : first + _LARGEST_CHUNK]
                yield np.stack([np.full(len(part), which, np.int64), part], axis=1)


def positive(weights: Mapping[str, float]) -> dict[str, float]:
    """The sources that are drawn at all, in order of name (the order in the file is no choice)."""
    return {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}


class Epochs:
    """The rows of one source, epoch after epoch, each in an order of its own.

    An epoch shuffles the shards, then takes `shuffle_shards` of them at a time and shuffles their
    samples together. So files are read a few at a time, each once an epoch, and neighbours in a
    shard end up a whole window apart; a sample's window changes with every epoch.
    """

    def __init__(self, source: MixSource, seed: int, shuffle_shards: int):
        assert len(source) > 0
        self._source, self._seed, self._together = source, seed, shuffle_shards
        self._epoch = -1
        self._generator = philox(0)
        self._shards = np.empty(0, np.int64)  # of this epoch, not yet begun
        self._left = np.empty(0, np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, int64."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            while not len(self._left):
                self._next_window()
            parts.append(self._left[:count])
            self._left = self._left[count:]
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _next_window(self) -> None:
        if not len(self._shards):
            self._epoch += 1
            self._generator = philox(self._seed, self._source.name, self._epoch)
            self._shards = self._generator.permutation(len(self._source.bounds) - 1)
        window, self._shards = self._shards[: self._together], self._shards[self._together :]
        rows = self._source.rows(window)
        self._left = rows[self._generator.permutation(len(rows))]
