"""Sharing out packs: everything once, the same on every rank, and level."""

import numpy as np
import pytest

from data_shards.balance import PackCost, assign, level, share
from data_shards.plan import Plan, PlanError

COST = PackCost(tile=1.0, pair=2e-6)


def made_plan(packs: int, steps: int = 1, seed: int = 0, empty: int = 0) -> Plan:
    """Packs with tiles and attention as a mixture of pictures and long texts has them."""
    generator = np.random.default_rng(seed)
    count = packs * steps
    tiles = generator.integers(18, 30, count) * (generator.random(count) > 0.1)
    attention = np.exp(generator.normal(np.log(25e6), 0.5, count)).astype(np.int64)
    if empty:
        tiles[-empty:] = attention[-empty:] = 0
    offsets = np.arange(count + 1, dtype=np.int64)
    samples = np.stack([np.zeros(count), np.arange(count)], axis=1).astype(np.int32)
    return Plan("", ("a",), steps, packs, 16_384, 8, offsets, samples, tiles.astype(np.int32),
                attention, {}, {}, {}, {})  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_pack_once_in_micro_batches_of_equal_size(size: int, micro_batch_size: int) -> None:
    plan = made_plan(48, steps=3, empty=5)
    for step in range(3):
        whole = assign(plan, step, size, micro_batch_size, COST)
        assert whole == [share(plan, step, r, size, micro_batch_size, COST) for r in range(size)]
        count = 48 // (size * micro_batch_size)
        assert [len(mine) for mine in whole] == [count] * size
        packs = [number for mine in whole for part in mine for number in part]
        assert all(len(part) == micro_batch_size for mine in whole for part in mine)
        assert sorted(packs) == list(range(step * 48, step * 48 + 48))


def test_what_does_not_divide_is_refused() -> None:
    plan = made_plan(12)
    with pytest.raises(PlanError, match="12 is not a multiple of stage.micro_batch_size=1 times 5"):
        share(plan, 0, 0, 5, 1, COST)
    with pytest.raises(PlanError, match="stage.micro_batch_size=4 times 6"):
        share(plan, 0, 0, 6, 4, COST)
    with pytest.raises(PlanError, match="outside the plan's 1 steps"):
        share(plan, 1, 0, 1, 1, COST)


def straggler(plan: Plan, size: int, values: np.ndarray, by_cost: bool = True) -> float:
    """Mean over steps of what the heaviest replica has beside the mean one."""
    found = []
    for step in range(plan.steps):
        if by_cost:
            shares = [sum(mine, []) for mine in assign(plan, step, size, 1, COST)]
        else:
            numbers = plan.pack_numbers(step)
            shares = [list(numbers[rank::size]) for rank in range(size)]
        sums = np.array([values[mine].sum() for mine in shares], float)
        found.append(sums.max() / sums.mean())
    return float(np.mean(found))


def test_tiles_and_cost_are_level_at_the_same_time() -> None:
    plan = made_plan(128, steps=20)
    cost = COST.of(plan.tiles, plan.attention)
    for values, before in ((plan.tiles, 1.1), (cost, 1.15)):
        assert straggler(plan, 32, values, by_cost=False) > before
        assert straggler(plan, 32, values) < 1.07
        assert straggler(plan, 8, values) < 1.005


def test_with_one_pack_each_there_is_nothing_to_level() -> None:
    plan = made_plan(32)
    assert sorted(assign(plan, 0, 32, 1, COST)) == [[[n]] for n in range(32)]


def test_level_is_never_worse_than_the_best_of_few() -> None:
    """Against every way of splitting eight rows in two: at most 2 % above the best."""
    from itertools import combinations

    generator = np.random.default_rng(0)
    for _ in range(30):
        work = generator.integers(100, 200, (8, 2))
        groups = level(work, 2)
        found = max(int(work[group].sum(axis=0).max()) for group in groups)
        best = min(
            max(
                int(work[list(half)].sum(axis=0).max()),
                int((work.sum(axis=0) - work[list(half)].sum(axis=0)).max()),
            )
            for half in combinations(range(8), 4)
        )
        assert best <= found <= 1.02 * best


def test_pure_and_in_whole_numbers() -> None:
    """Sums of floats may differ in the last bit between processors, and with them the shares."""
    plan = made_plan(48)
    first = assign(plan, 0, 6, 2, COST)
    assert first == assign(plan, 0, 6, 2, COST)
    # Another unit of cost changes nothing: a power of two, so that rounding is the same.
    assert first == assign(plan, 0, 6, 2, PackCost(COST.tile * 2**20, COST.pair * 2**20))
    nothing = assign(made_plan(8, empty=8), 0, 4, 1, PackCost(0.0, 0.0))
    assert sorted(n for mine in nothing for part in mine for n in part) == list(range(8))


def test_members_stand_in_the_order_of_the_plan() -> None:
    for mine in assign(made_plan(48), 0, 3, 2, COST):
        assert all(part == sorted(part) for part in mine)
        assert mine == sorted(mine)
