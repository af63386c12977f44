"""Samples that were seen before: in their own source, in an earlier one, or in an evaluation set.

Two images are *the same* where their stored bytes or their pixels are equal, and *alike* where they
are the same, or their difference hashes differ in at most `near_bits` of 256 bits and both show
enough for that to mean something (`has_detail`): blank pages, plain backgrounds and sparse drawings
have almost empty hashes, and are alike only where they are the same.

Dropped are, in this order, and the first one, in the order of the sources, stays:

1. a sample with an image alike to one of an evaluation set, or without images and with the same
   text as a sample of one;
2. a sample with the same text as another, and with images that are alike, one by one in order;
3. of sources with `unique_images`, a sample whose images are alike to another's, in order, whatever
   the text.

A sample is compared with those that stay, not with those that were dropped: of pictures that
change little by little, one in every few stays. Everything is in arrays: under 300 bytes a sample
with one image at the peak, beside the tables themselves (110 bytes).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from conf.schema.data import DuplicatesConfig
from data_shards.fingerprint_arrays import (
    NamedFingerprints,
    Samples,
    folded,
    lookup,
    mixed,
    repeated_rows,
)
from data_shards.near_hashes import count_bits, near_matches, near_pairs

MIN_DETAIL = 24  # of 256 bits that must be set, and unset


def has_detail(hashes_IW: np.ndarray) -> np.ndarray:
    """bool [I]: whether a small distance from this hash (uint64 [I, 4]) says that pictures are
    alike. A bit is set where the picture grows darker to the right by more than noise."""
    bits = count_bits(hashes_IW)
    return (bits >= MIN_DETAIL) & (bits <= 256 - MIN_DETAIL)


def find_duplicates(
    sources: Sequence[NamedFingerprints],
    evaluation: Sequence[NamedFingerprints],
    rules: DuplicatesConfig,
    unique_images: Mapping[str, bool],
) -> dict[str, dict[int, str]]:
    """Which samples to leave out, and why.

    Args:
        sources: in the order of data.sources: the first of alike samples stays.
        evaluation: the sets that nothing may be trained on.
        unique_images: source name -> its setting; missing names count as False.

    Returns:
        source name -> row number -> the reason, which names the sample it is alike to.
    """
    samples, tests = Samples.of(sources), Samples.of(evaluation)
    bits = rules.near_bits
    reasons: dict[str, dict[int, str]] = {source.name: {} for source in sources}
    left = np.ones(samples.count, bool)  # samples that are not dropped

    def drop(rows: np.ndarray, others: np.ndarray, among: Samples, words: str) -> None:
        left[rows] = False
        for row, other in zip(rows.tolist(), others.tolist(), strict=True):
            name, number = samples.place(row)
            other_name, other_number = among.place(other)
            reasons[name][number] = f"{words} row {other_number} of {other_name}"

    drop(*_same_text(samples, tests), tests, "a duplicate: the same text as evaluation set:")
    drop(*_seen_images(samples, tests, bits, left), tests, "an image alike to evaluation set:")
    scope = samples.text if rules.across_sources else mixed(samples.text, samples.source)
    if rules.exact:
        rows, firsts = repeated_rows(samples.keys(scope, samples.image), np.flatnonzero(left))
        drop(rows, firsts, samples, "a duplicate: the same text and images as")
        if bits is not None:
            alike = _alike(samples, scope, bits, np.flatnonzero(left))
            drop(*alike, samples, "a duplicate: the same text and images alike to")
    unique = np.array([bool(unique_images.get(source.name)) for source in sources], bool)
    if unique.any():
        nothing = np.zeros_like(samples.text)
        scope = nothing if rules.across_sources else mixed(nothing, samples.source)
        choosy = unique[samples.source]
        rows = np.flatnonzero(left & (samples.n_images > 0))
        drop(*_alike(samples, scope, bits, rows, choosy), samples, "images alike to those of")
    return reasons


def _same_text(samples: Samples, tests: Samples) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(samples.n_images == 0)
    match = lookup(tests.text, samples.text[rows])
    return rows[match >= 0], match[match >= 0]


def _seen_images(
    samples: Samples, tests: Samples, bits: int | None, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(rows with an image alike to a test's, the tests)."""
    match = lookup(tests.image, samples.image)
    if bits is not None:
        known = np.flatnonzero(has_detail(tests.hash))
        rest = np.flatnonzero((match < 0) & has_detail(samples.hash))
        near = near_matches(tests.hash[known], samples.hash[rest], bits)
        match[rest[near >= 0]] = known[near[near >= 0]]
    images = np.flatnonzero(match >= 0)
    rows, first = np.unique(samples.sample_of_image()[images], return_index=True)
    others = tests.sample_of_image()[match[images[first]]]
    return rows[left[rows]], others[left[rows]]


def _alike(
    samples: Samples,
    scope: np.ndarray,
    bits: int | None,
    rows: np.ndarray,
    choosy: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows with the scope of an earlier one that stays and images alike to its, that one).

    Only rows that are `choosy` (bool [N]; None: all) are dropped.
    """
    if choosy is None:
        choosy = np.ones(samples.count, bool)
    detail = has_detail(samples.hash) if bits is not None else np.zeros(len(samples.hash), bool)
    # Images with equal tokens are alike; so the samples of one key go together, and only their
    # first ones, the heads, are compared.
    tokens = np.where(detail[:, None], folded(samples.hash), samples.image)
    repeated, firsts = repeated_rows(samples.keys(scope, tokens), rows)
    head = np.arange(samples.count)
    head[repeated] = firsts
    heads = np.setdiff1d(rows, repeated, assume_unique=True)
    # The first sample of each head's key that stays in any case.
    steady = np.full(samples.count, samples.count)
    np.minimum.at(steady, head[rows[~choosy[rows]]], rows[~choosy[rows]])
    like = np.full(samples.count, -1, np.int64)
    for one, other in zip(*_near_samples(samples, scope, detail, heads, bits or 0), strict=True):
        # Ordered by `other`: what becomes of `one`, which comes before it, is settled.
        stays = one if like[one] < 0 or not choosy[one] else steady[one]
        if like[other] < 0 and stays < other:
            like[other] = stays
    like[repeated] = np.where(like[firsts] < 0, firsts, like[firsts])
    found = rows[choosy[rows] & (like[rows] >= 0)]
    return found, like[found]


def _near_samples(
    samples: Samples, scope: np.ndarray, detail: np.ndarray, heads: np.ndarray, bits: int
) -> tuple[list[int], list[int]]:
    """Pairs (earlier, later) among `heads` of the same scope and with images alike, by later."""
    count = samples.n_images
    is_head = np.zeros(samples.count, bool)
    is_head[heads] = True
    owner = samples.sample_of_image()
    images = np.flatnonzero(is_head[owner] & detail)
    owner = owner[images]
    position = images - samples.first_image[owner]
    context = mixed(mixed(scope[owner], count[owner]), position)[:, 0]
    # Most texts are there once: only what shares its context with another can have a pair.
    _, which, times = np.unique(context, return_inverse=True, return_counts=True)
    shared = times[which] > 1
    images, owner, context = images[shared], owner[shared], context[shared]
    one, other = near_pairs(samples.hash[images], context, bits)
    pairs = np.unique(np.stack([owner[other], owner[one]], 1), axis=0)
    earlier, later = pairs[:, 1], pairs[:, 0]
    good = np.ones(len(pairs), bool)
    for number in range(int(count[earlier].max(initial=0))):
        both = np.flatnonzero(good & (count[earlier] > number))
        a = samples.first_image[earlier[both]] + number
        b = samples.first_image[later[both]] + number
        same = (samples.image[a] == samples.image[b]).all(1)
        near = count_bits(samples.hash[a] ^ samples.hash[b]) <= bits
        good[both] = same | (near & detail[a] & detail[b])
    return earlier[good].tolist(), later[good].tolist()
