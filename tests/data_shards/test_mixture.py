"""Weighted draws: shares hold at every moment, epochs are permutations."""

from collections.abc import Iterator

import numpy as np

from data_shards.mixture import MixSource, draws, every_sample, positive

MANY = 100_000


def sources() -> list[MixSource]:
    return [
        MixSource("a", np.arange(0, 5000, dtype=np.int64), 4),
        MixSource("b", np.arange(100, 107, dtype=np.int64), 3),
        MixSource("c", np.arange(40_000, dtype=np.int64) * 2, 2),
        MixSource("d", np.array([9], np.int64), 0.001),
    ]


def first(count: int, seed: int = 1) -> np.ndarray:
    return _first(draws(sources(), seed), count)


def _first(chunks: Iterator[np.ndarray], count: int) -> np.ndarray:
    found = np.empty((0, 2), np.int64)
    while len(found) < count:
        found = np.concatenate([found, next(chunks)])
    return found[:count]


def test_shares_are_exact_to_a_few_samples_at_every_point() -> None:
    found = first(MANY)
    weights = np.array([source.weight for source in sources()])
    shares = weights / weights.sum()
    for which, share in enumerate(shares):
        seen = np.cumsum(found[:, 0] == which)
        wanted = share * np.arange(1, len(found) + 1)
        assert np.abs(seen - wanted).max() < 6


def test_every_epoch_is_a_permutation_and_they_differ() -> None:
    found = first(MANY)
    rows = found[found[:, 0] == 1, 1]
    epochs = rows[: len(rows) // 7 * 7].reshape(-1, 7)
    assert (np.sort(epochs, axis=1) == np.arange(100, 107)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1000
    large = found[found[:, 0] == 0, 1][:10_000].reshape(2, 5000)
    assert (np.sort(large, axis=1) == np.arange(5000)).all()
    assert not np.array_equal(large[0], large[1])


def test_pure_in_the_seed() -> None:
    assert np.array_equal(first(1000), first(1000))
    assert not np.array_equal(first(1000), first(1000, seed=2))


def test_the_order_is_this_one() -> None:
    """Golden: a change here changes the order of every run (raise plan.ALGORITHM then)."""
    assert first(12).tolist() == GOLDEN


def test_a_source_keeps_its_order_when_another_joins() -> None:
    alone = _first(draws(sources()[:1], 1), MANY)
    together = first(MANY)
    mine = together[together[:, 0] == 0, 1]
    assert np.array_equal(alone[: len(mine), 1], mine)


def test_every_sample_once() -> None:
    found = every_sample(sources())
    assert len(found) == 5000 + 7 + 40_000 + 1 and len(np.unique(found, axis=0)) == len(found)


def test_zero_weights_are_left_out_and_names_sorted() -> None:
    assert positive({"z": 1, "b": 0, "a": 2.5}) == {"a": 2.5, "z": 1.0}


GOLDEN = [
    [1, 106],
    [0, 1121],
    [1, 104],
    [0, 1486],
    [2, 46198],
    [1, 103],
    [0, 3883],
    [2, 57650],
    [0, 3746],
    [0, 1764],
    [1, 100],
    [0, 4856],
]
