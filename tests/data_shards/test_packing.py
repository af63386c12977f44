"""Online best fit: nothing lost, nothing too large, tight, and near to the order of the draws."""

import numpy as np
import pytest

from data_shards.packing import Packer, PackLimits

Samples = list[tuple[int, int]]


def lengths(count: int, seed: int = 0, text: float = 0.25) -> Samples:
    """A mixture like the real one: images of 2 to 13 tiles with 600 tokens each, and text."""
    generator = np.random.default_rng(seed)
    tiles = generator.integers(2, 14, count) * (generator.random(count) >= text)
    words = np.minimum(generator.lognormal(5, 1, count), 6000).astype(int) + 5
    return list(zip((tiles * 600 + words).tolist(), tiles.tolist(), strict=True))


def pack(
    samples: Samples, limits: PackLimits, target: int | None = None, short: int = 0, part: int = 999
) -> list[list[int]]:
    """Packs of positions, the samples added in parts."""
    expected = sum(tokens for tokens, _ in samples) / limits.tokens
    packer = Packer(limits, expected if target is None else target, target)
    packer.short = short
    found: list[list[int]] = []

    def take() -> None:
        codes, counts = packer.take()
        found.extend(c.tolist() for c in np.split(codes, np.cumsum(counts)[:-1]) if len(c))

    for first in range(0, len(samples), part):
        chosen = samples[first : first + part]
        codes = range(first, first + len(chosen))
        placed = packer.add(codes, [s[0] for s in chosen], [s[1] for s in chosen])
        take()
        if placed < len(chosen):
            break
    packer.close()
    take()
    assert packer.begun == len(found)
    return found


@pytest.mark.parametrize("tiles", [None, 20])
@pytest.mark.parametrize("short", [0, 300, 2000])
def test_every_sample_once_and_within_limits(tiles: int | None, short: int) -> None:
    samples = lengths(6000)
    packs = pack(samples, PackLimits(16_384, tiles), short=short)
    assert sorted(position for pack in packs for position in pack) == list(range(6000))
    for each in packs:
        assert sum(samples[p][0] for p in each) <= 16_384
        if tiles is not None:
            assert sum(samples[p][1] for p in each) <= tiles


def efficiency(samples: Samples, packs: list[list[int]]) -> float:
    return sum(samples[p][0] for pack in packs for p in pack) / (len(packs) * 16_384)


def test_packs_are_full() -> None:
    """Also those that are left open at the end."""
    for count, least in ((400, 0.95), (20_000, 0.985)):
        samples = lengths(count)
        assert efficiency(samples, pack(samples, PackLimits(16_384))) > least


def test_room_that_nothing_fits_is_not_left() -> None:
    """Cropped pictures alone, of any size from 1,200 tokens on: plain best fit leaves such room."""
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(np.log(1200), np.log(7800), 20_000)).astype(int)
    samples = [(size, 0) for size in sizes.tolist()]
    plain, careful = (pack(samples, PackLimits(16_384), short=short) for short in (0, 1300))
    assert efficiency(samples, careful) > efficiency(samples, plain) + 0.005 > 0.97


def test_how_samples_are_cut_into_parts_does_not_matter() -> None:
    samples = lengths(3000)
    whole = pack(samples, PackLimits(16_384, 25), part=3000, short=300)
    assert whole == pack(samples, PackLimits(16_384, 25), part=7, short=300)


def test_a_target_is_reached_exactly_and_nothing_is_passed_over() -> None:
    packs = pack(lengths(20_000), PackLimits(16_384), 40, part=64)
    assert len(packs) == 40 and all(packs)
    positions = sorted(position for pack in packs for position in pack)
    assert positions == list(range(len(positions)))


def test_fewer_samples_than_the_target() -> None:
    assert pack([(10, 0)], PackLimits(16), 3) == [[0]]


def test_without_packing_one_each_in_order() -> None:
    samples = [(5, 0)] * 10
    limits = PackLimits(16, packing=False)
    assert pack(samples, limits) == [[n] for n in range(10)]
    assert pack(samples, limits, 4, part=3) == [[n] for n in range(4)]


def test_best_fit_takes_the_tightest_room() -> None:
    # 6 and 9 open two packs of 16; 7 fits best beside 9, 10 beside 6.
    packs = pack([(6, 0), (14, 0), (11, 0), (5, 0), (10, 0)], PackLimits(16))
    assert sorted(map(sorted, packs)) == [[0, 4], [1], [2, 3]]


def test_a_pack_closes_when_nothing_can_fit_any_more() -> None:
    packer = Packer(PackLimits(16, least_tokens=3, least_tiles=1), 1000)
    packer.tiles = 4
    packer.add([0], [14], [1])  # 2 tokens left
    packer.add([1], [4], [4])  # no tile left
    assert packer.take()[1].tolist() == [1, 1]
    packer.add([2], [4], [3])
    assert packer.take()[1].tolist() == []


def test_no_sample_waits_for_long() -> None:
    """A pack that nothing completes is closed all the same."""
    samples = [(9000, 0)] + [(16_384, 0)] * 5000
    packs = pack(samples, PackLimits(16_384, open_packs=16))
    assert packs.index([0]) < 600
    spread = lengths(20_000)
    found = pack(spread, PackLimits(16_384, 26, open_packs=16), short=150)
    assert max(max(each) - min(each) for each in found) < 16 * 32 + 100


def test_a_limit_on_tiles_holds_for_packs_opened_under_it() -> None:
    packer = Packer(PackLimits(100), 1000)
    packer.tiles = 5
    packer.add([0, 1], [10, 10], [5, 5])
    packer.tiles = None
    packer.add([2, 3], [10, 10], [9, 9])
    packer.close()
    codes, counts = packer.take()
    assert counts.tolist() == [1, 1, 2] and codes.tolist() == [0, 1, 2, 3]
