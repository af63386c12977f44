"""Pairs of 256-bit hashes that differ in at most k bits: all of them, without comparing all.

The bits are dealt out to k + 2 bands. Bits that differ touch at most k bands, so that two hashes
within k bits agree in two bands at least (the pigeonhole principle): whatever shares some pair of
bands is looked at, and nothing within k bits is missed but in crowds (`near_pairs`). Two bands and
not one, because hashes of pictures are far from random, and one band of a page is often white.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np

WORDS = 4  # uint64 of a hash
# Odd constants (from the digits of the golden ratio, as in SplitMix64): keys are sums of products.
_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64
)
_ODD_CONTEXT = np.uint64(0xA0761D6478BD642F)
CROWD, FIRST = 32, 16
_CHUNK = 1 << 20  # hashes looked up at a time


def near_pairs(
    hashes_NW: np.ndarray, context_N: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of the same context within `bits` bits, each once.

    Time and memory grow as N log N and N (about 64 bytes a hash). Where over `CROWD` hashes share
    two bands, each is compared with the `CROWD` before it and with the first `FIRST` only, or a
    million frames of one film would be a million million pairs.

    Args:
        hashes_NW: uint64 [N, 4].
        context_N: uint64 [N]; hashes of different contexts are never compared.
        bits: 0 to 7.

    Returns:
        (earlier, later): int64 [pairs] indices, ordered by later, then earlier.
    """
    bands_BW = _bands(bits)
    found = [(np.empty(0, np.int64),) * 2]
    for first, second in combinations(range(len(bands_BW)), 2):
        mask_W = bands_BW[first] | bands_BW[second]
        keys_N = _keys(hashes_NW, mask_W) + context_N * _ODD_CONTEXT
        order_N = np.argsort(keys_N, kind="stable")
        keys_N = keys_N[order_N]
        for left, right in _within_runs(keys_N):
            a, b = order_N[left], order_N[right]
            differing = hashes_NW[a] ^ hashes_NW[b]
            good = (context_N[a] == context_N[b]) & (_count(differing) <= bits)
            good &= ~(differing & mask_W).any(1)  # keys may be equal by chance
            # Where bands agree that come before these two, another turn has the pair.
            for band in range(second):
                if band != first:
                    good &= (differing & bands_BW[band]).any(1)
            found.append((np.minimum(a, b)[good], np.maximum(a, b)[good]))
    earlier = np.concatenate([pair[0] for pair in found])
    later = np.concatenate([pair[1] for pair in found])
    order = np.lexsort((earlier, later))
    return earlier[order], later[order]


def near_matches(known_KW: np.ndarray, hashes_NW: np.ndarray, bits: int) -> np.ndarray:
    """For each hash, a known one within `bits` bits: int64 [N], the lowest index, or -1."""
    match_N = np.full(len(hashes_NW), -1, np.int64)
    if not len(known_KW):
        return match_N
    bands_BW = _bands(bits)
    for first, second in combinations(range(len(bands_BW)), 2):
        mask_W = bands_BW[first] | bands_BW[second]
        keys_K = _keys(known_KW, mask_W)
        order_K = np.argsort(keys_K, kind="stable")
        keys_K = keys_K[order_K]
        for start in range(0, len(hashes_NW), _CHUNK):
            some = hashes_NW[start : start + _CHUNK]
            keys = _keys(some, mask_W)
            place = np.searchsorted(keys_K, keys)
            row = np.arange(len(some))
            while len(row):
                inside = place < len(keys_K)
                row, place = row[inside], place[inside]
                same = keys_K[place] == keys[row]
                row, place = row[same], place[same]
                known = order_K[place]
                good = _count(known_KW[known] ^ some[row]) <= bits
                at, known = start + row[good], known[good]
                lower = (match_N[at] < 0) | (known < match_N[at])
                match_N[at[lower]] = known[lower]
                # The sort is stable: what comes later in this run has a higher index.
                row, place = row[~good], place[~good] + 1
    return match_N


def as_words(hashes: bytes | np.ndarray | memoryview) -> np.ndarray:
    """Hashes of 32 bytes each as uint64 [N, 4]."""
    return np.frombuffer(hashes, "<u8").reshape(-1, WORDS)


def count_bits(hashes_NW: np.ndarray) -> np.ndarray:
    """Bits that are set: int64 [N]."""
    return _count(hashes_NW)


def _count(words_NW: np.ndarray) -> np.ndarray:
    return np.bitwise_count(words_NW).sum(1, dtype=np.int64)


def _bands(bits: int) -> np.ndarray:
    """uint64 [bits + 2, 4]: masks that share no bit. A band has samples from all over the picture:
    the 16 x 16 bits are dealt out along steep diagonals."""
    row, column = np.divmod(np.arange(256), 16)
    band = (column + 3 * row) % (bits + 2)
    masks = [np.packbits(band == number).tobytes() for number in range(bits + 2)]
    return as_words(b"".join(masks))


def _keys(hashes_NW: np.ndarray, mask_W: np.ndarray) -> np.ndarray:
    """uint64 [N], equal where the masked bits are equal, and otherwise seldom."""
    keys_N = np.zeros(len(hashes_NW), np.uint64)
    for word in range(WORDS):
        keys_N += (hashes_NW[:, word] & mask_W[word]) * _ODD[word]
    return keys_N


def _within_runs(keys_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(left, right) positions of equal keys, of all pairs, one distance after the other."""
    left = np.flatnonzero(keys_N[1:] == keys_N[:-1])
    for distance in range(1, CROWD + 1):
        if not len(left):
            return
        yield left, left + distance
        left = left[left + distance + 1 < len(keys_N)]
        left = left[keys_N[left] == keys_N[left + distance + 1]]
    right = left + CROWD + 1  # what has more than CROWD before it in its run
    start = np.searchsorted(keys_N, keys_N[right])
    for number in range(FIRST):
        far = right - start - number > CROWD
        yield start[far] + number, right[far]
