"""Which sample comes next: sources mixed by weight, each a sequence of reshuffled epochs.

Pure integer arithmetic on the seed: no state, no generator shared between sources.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 16  # draws made at a time
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
    """Endless draws, in chunks of int64 [CHUNK, 2]: (source number, manifest row).

    The k-th draw of a source is element k mod n of its (k div n)-th permutation.
    """
    weights = np.array([source.weight for source in sources], np.float64)
    # Upper ends of each source's share of the 64-bit circle; the last end is the circle's.
    ends = (np.cumsum(weights / weights.sum())[:-1] * 2.0**64).astype(np.uint64)
    start = philox(seed, "mixture").integers(0, 2**64, dtype=np.uint64)
    taken = [0] * len(sources)
    position = 0
    while True:
        index = np.arange(position, position + CHUNK, dtype=np.uint64)
        points = start + index * _GOLDEN  # modulo 2^64
        number = np.searchsorted(ends, points, side="right")
        chunk = np.empty((CHUNK, 2), np.int64)
        chunk[:, 0] = number
        for which, source in enumerate(sources):
            mine = np.flatnonzero(number == which)
            chunk[mine, 1] = _take(source, seed, taken[which], len(mine))
            taken[which] += len(mine)
        yield chunk
        position += CHUNK


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


def _take(source: MixSource, seed: int, first: int, count: int) -> np.ndarray:
    """Draws first .. first+count-1 of one source."""
    size = len(source.rows)
    parts = []
    while count > 0:
        epoch, offset = divmod(first, size)
        order = philox(seed, source.name, epoch).permutation(size)
        part = order[offset : offset + count]
        parts.append(source.rows[part])
        first += len(part)
        count -= len(part)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
