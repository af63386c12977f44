"""Online best fit: nothing lost, nothing too large, and tight."""

import numpy as np
import pytest

from data_shards.packing import PackLimits, pack_samples


def lengths(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """A mixture like the real one: images of 2 to 13 tiles with 600 tokens each, and text."""
    generator = np.random.default_rng(seed)
    tiles = generator.integers(2, 14, count) * (generator.random(count) > 0.25)
    text = np.minimum(generator.lognormal(5, 1, count), 6000).astype(int) + 5
    return list(zip((tiles * 600 + text).tolist(), tiles.tolist(), strict=True))


@pytest.mark.parametrize("tiles", [None, 20])
def test_every_sample_once_and_within_limits(tiles: int | None) -> None:
    samples = lengths(3000)
    packs = pack_samples(samples, PackLimits(16_384, tiles))
    assert sorted(position for pack in packs for position in pack) == list(range(3000))
    for pack in packs:
        assert sum(samples[p][0] for p in pack) <= 16_384
        if tiles is not None:
            assert sum(samples[p][1] for p in pack) <= tiles


def test_packs_are_full() -> None:
    samples = lengths(20_000)
    packs = pack_samples(samples, PackLimits(16_384))
    assert sum(tokens for tokens, _ in samples) / (len(packs) * 16_384) > 0.975


def test_a_target_is_reached_exactly_and_nothing_is_read_beyond_need() -> None:
    samples = iter(lengths(20_000))
    packs = pack_samples(samples, PackLimits(16_384), 40)
    assert len(packs) == 40 and all(packs)
    positions = sorted(position for pack in packs for position in pack)
    assert positions == list(range(len(positions)))
    assert len(list(samples)) == 20_000 - len(positions) - 1  # the one that found no room


def test_fewer_samples_than_the_target() -> None:
    assert pack_samples([(10, 0)], PackLimits(16), 3) == [[0]]


def test_without_packing_one_each_in_order() -> None:
    samples = [(5, 0)] * 10
    assert pack_samples(samples, PackLimits(16, packing=False)) == [[n] for n in range(10)]
    assert pack_samples(samples, PackLimits(16, packing=False), 4) == [[n] for n in range(4)]


def test_best_fit_takes_the_tightest_room() -> None:
    # 6 and 9 open two packs of 16; 7 fits best beside 9, 10 beside 6.
    packs = pack_samples([(6, 0), (14, 0), (11, 0), (5, 0), (10, 0)], PackLimits(16))
    assert sorted(map(sorted, packs)) == [[0, 4], [1], [2, 3]]


@pytest.mark.parametrize("multiple", [1, 7, 16])
def test_wanted_samples_are_placed_and_packs_rounded_up(multiple: int) -> None:
    samples = lengths(20_000)
    packs = pack_samples(samples, PackLimits(16_384), wanted=1000, multiple=multiple)
    positions = sorted(position for pack in packs for position in pack)
    assert positions == list(range(len(positions))) and len(positions) >= 1000
    assert len(packs) % multiple == 0 and all(packs)
    needed = len(pack_samples(samples[:1000], PackLimits(16_384)))
    assert needed <= len(packs) < needed + multiple
