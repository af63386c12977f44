"""Does the checkpoint hold every number once?

The rule is Megatron's (`validate_sharding_integrity`, dist_checkpointing/validation.py): of the
ranks that hold the same piece exactly one is its main replica, and the main replicas' pieces cover
the whole tensor without overlap. There it runs on what all ranks send; here on what was simulated.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod

from tools.dryrun.report import RankReport, Shard

Owned = tuple[int, Shard]
Piece = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def problems(reports: Sequence[RankReport]) -> list[str]:
    """What is wrong with the checkpoint that these ranks would write.

    They hold all tensors. Pickled objects, of which each rank may have its own (its random-number
    state), are only looked at for doubles.
    """
    shards: dict[str, list[Owned]] = defaultdict(list)
    for report in reports:
        for shard in report.shards:
            shards[shard.key].append((report.rank, shard))
    return [problem for key in sorted(shards) for problem in _key(shards[key])]


def global_sizes(reports: Sequence[RankReport]) -> dict[str, tuple[int, str]]:
    """Key -> (numbers, dtype) of every tensor of the checkpoint."""
    return {
        shard.key: (prod(shard.global_shape), shard.dtype)
        for report in reports
        for shard in report.shards
        if shard.dtype != "object"
    }


def _key(owned: Sequence[Owned]) -> Iterator[str]:
    first_rank, first = owned[0]
    for rank, shard in owned:
        if (shard.global_shape, shard.dtype) != (first.global_shape, first.dtype):
            yield (
                f"{first.key}: rank {first_rank} says {_tensor(first)}, rank {rank} says "
                f"{_tensor(shard)}"
            )
            return
    pieces: dict[Piece, list[int]] = defaultdict(list)
    for rank, shard in owned:
        if shard.main:
            pieces[shard.offset, shard.shape].append(rank)
    for (offset, _), ranks in pieces.items():
        if len(ranks) > 1:
            yield (
                f"{first.key}: the piece at {list(offset)} of {_tensor(first)} is written by ranks "
                f"{', '.join(map(str, ranks))}; replica_id must be 0 on one of them only"
            )
            return
    if first.dtype == "object":
        return
    yield from _cover(first, list(pieces))


def _cover(first: Shard, pieces: Sequence[Piece]) -> Iterator[str]:
    for one, other in _meeting(sorted(pieces)):
        if all(a < b + n and b < a + m for a, m, b, n in zip(*one, *other, strict=True)):
            yield (
                f"{first.key}: the pieces at {list(one[0])} and {list(other[0])} of "
                f"{_tensor(first)} overlap"
            )
            return
    held = sum(prod(shape) for _, shape in pieces)
    if held != prod(first.global_shape):
        yield (
            f"{first.key}: of {prod(first.global_shape)} numbers of {_tensor(first)} the ranks "
            f"write {held}"
        )


def _meeting(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Pairs that meet along the first axis, out of pieces in the order of their offsets."""
    for number, one in enumerate(pieces):
        end = one[0][0] + one[1][0] if one[0] else 1
        for other in islice(pieces, number + 1, None):
            if other[0] and other[0][0] >= end:
                break
            yield one, other


def _tensor(shard: Shard) -> str:
    return f"{shard.dtype} {list(shard.global_shape)}"
