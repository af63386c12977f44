"""Which packs of a step each replica trains on, and in which micro-batch.

The plan says which packs make a global batch; nothing here changes that. It only levels the work:
tiles and attention differ from pack to pack, and every replica waits for the slowest.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.plan import Plan, PlanError

_MOST_SWAPS = 100


@dataclass(frozen=True)
class PackCost:
    """What a pack costs beyond its tokens, of which all packs have as many.

    Attributes:
        tile: cost of one tile through the vision tower, in any unit (FLOPs, say).
        pair: cost of one (query, key) pair of causal attention, in the same unit.
    """

    tile: float = 1.0
    pair: float = 0.0

    def of(self, tiles: np.ndarray, attention: np.ndarray) -> np.ndarray:
        """float64, the cost of each pack."""
        return tiles * float(self.tile) + attention * float(self.pair)


def share(
    plan: Plan, step: int, rank: int, size: int, micro_batch_size: int, cost: PackCost
) -> list[list[int]]:
    """The micro-batches of replica `rank` of `size`, as pack numbers of the plan.

    Raises:
        PlanError: as `assign`.
    """
    return assign(plan, step, size, micro_batch_size, cost)[rank]


def assign(
    plan: Plan, step: int, size: int, micro_batch_size: int, cost: PackCost
) -> list[list[list[int]]]:
    """The micro-batches of every replica; each pack of the step stands in exactly one.

    All replicas have as many micro-batches of `micro_batch_size` packs. A pure function of the
    plan, so each rank works it out alone.

    Raises:
        PlanError: a step outside the plan, or packs that cannot be shared out evenly.
    """
    numbers = plan.pack_numbers(step)
    if len(numbers) % (size * micro_batch_size):
        raise PlanError(
            f"stage.global_batch_size={len(numbers)} is not a multiple of "
            f"stage.micro_batch_size={micro_batch_size} times {size} data-parallel replicas; "
            "change it or parallel"
        )
    chosen = slice(numbers.start, numbers.stop)
    tiles, attention = plan.tiles[chosen], plan.attention[chosen]
    work = _whole_numbers([cost.of(tiles, attention), tiles])
    shares = []
    for mine in level(work, size):
        parts = level(work[mine], len(mine) // micro_batch_size)
        shares.append([[numbers[mine[n]] for n in part] for part in parts])
    return shares


def level(work: np.ndarray, groups: int) -> list[list[int]]:
    """Split rows of `work` into `groups` of equal size, none much above the others in any column.

    First the costliest to the group with the smallest sum that is not full (longest processing
    time first, Graham 1969), by the first column; then, as long as that helps, the heaviest group
    gives a row to another one for a lighter row. Heavy is who has most of any column, measured
    by the column's sum.

    Args:
        work: int64 [rows, columns], rows a multiple of `groups`; whole numbers, for which sums
            are the same on every machine.

    Returns:
        Positions in order within a group, groups by their first.
    """
    size = len(work) // groups
    members = np.array(_longest_first(work[:, 0].tolist(), groups, size)).reshape(groups, size)
    sums = work[members].sum(axis=1)  # [groups, columns]
    for _ in range(_MOST_SWAPS if groups > 1 else 0):
        heaviest = int(sums.max(axis=1).argmax())
        # more[i, g, j]: what the heaviest group has more after giving its i-th for g's j-th
        more = work[members][None] - work[members[heaviest]][:, None, None]
        there = (sums[None, :, None] - more).max(axis=-1)
        worst = np.maximum((sums[heaviest] + more).max(axis=-1), there)
        worst[:, heaviest] = sums[heaviest].max()
        i, group, j = np.unravel_index(int(worst.argmin()), worst.shape)
        if worst[i, group, j] >= sums[heaviest].max():
            break
        sums[heaviest] += more[i, group, j]
        sums[group] -= more[i, group, j]
        given, taken = members[heaviest, i], members[group, j]
        members[heaviest, i], members[group, j] = taken, given
    return sorted(sorted(group) for group in members.tolist())


def _longest_first(costs: list[int], groups: int, size: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(groups)]
    open_groups = [(0, group) for group in range(groups)]
    for position in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        total, group = heapq.heappop(open_groups)
        found[group].append(position)
        if len(found[group]) < size:
            heapq.heappush(open_groups, (total + costs[position], group))
    return found


def _whole_numbers(columns: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [packs, columns]; all columns add up to nearly the same."""
    found = []
    for values in columns:
        most = max(float(values.max(initial=0)), 1e-300)
        # Each value by itself: a floating-point sum may differ between machines.
        whole = np.round(values / most * (1 << 30)).astype(np.int64)
        found.append(whole * ((1 << 46) // max(int(whole.sum()), 1)))
    return np.stack(found, axis=1)
