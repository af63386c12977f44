"""Which ranks are simulated, and why the others are like them."""

from dataclasses import dataclass

from conf.schema import ParallelConfig
from conf.schema.errors import ConfigError
from tools.dryrun.report import Coordinates


@dataclass(frozen=True)
class Sample:
    """Ranks to simulate, and the reasons to print."""

    ranks: tuple[int, ...]
    reasons: tuple[str, ...]
    # Ranks of which the checkpoint's pieces are needed beside: each has its own part of a
    # distributed optimizer. They build model and optimizer and take no step.
    writers: tuple[int, ...] = ()
    whole_checkpoint: bool = True  # both together write all of it


def coordinates(parallel: ParallelConfig, rank: int) -> Coordinates:
    """Megatron's order of ranks ("tp-cp-ep-dp-pp"): tensor runs fastest, pipeline slowest."""
    rest, tensor = divmod(rank, parallel.tensor)
    rest, context = divmod(rest, parallel.context)
    pipeline, data = divmod(rest, parallel.data)
    return Coordinates(tensor, context, data, pipeline)


def choose(parallel: ParallelConfig, wanted: str) -> Sample:
    """`wanted`: "sample", "all", or ranks as "0,1,64".

    Raises:
        ConfigError: neither, or a rank that the layout does not have.
    """
    world = parallel.world_size
    everyone = range(world)
    if wanted == "all":
        return Sample(tuple(everyone), (f"all {world} ranks",))
    if wanted == "sample":
        return _sample(parallel)
    try:
        ranks = tuple(sorted({int(word) for word in wanted.strip("[]").split(",")}))
    except ValueError:
        raise ConfigError(
            f"ranks={wanted}: write sample, all, or numbers with commas between"
        ) from None
    missing = [rank for rank in ranks if rank not in everyone]
    if missing:
        raise ConfigError(f"ranks={wanted}: the layout has ranks 0 to {world - 1}")
    reason = f"ranks {', '.join(map(str, ranks))}, as asked"
    return Sample(ranks, (reason,), whole_checkpoint=len(ranks) == world)


def _sample(parallel: ParallelConfig) -> Sample:
    """Replica 0 in full; of a middle one and the last, both ends of a row and of a column."""
    last = parallel.data - 1
    others = sorted({parallel.data // 2, last} - {0})
    corners = {(0, 0), (parallel.tensor - 1, 0), (0, parallel.context - 1)}
    chosen = []
    for rank in range(parallel.world_size):
        place = coordinates(parallel, rank)
        if place.data == 0 or (place.data in others and (place.tensor, place.context) in corners):
            chosen.append(rank)
    size = parallel.model_ranks
    reasons = [f"data-parallel replica 0 in full, {size} of {size} ranks"]
    if others:
        named = " and ".join(map(str, others))
        reasons.append(
            f"of replica{'s' if len(others) > 1 else ''} {named}: on every pipeline stage the "
            "first and last tensor and context rank"
        )
    left = tuple(rank for rank in range(parallel.world_size) if rank not in chosen)
    if left:
        reasons += [
            f"the other {len(left)} run the same code on the same shapes: replicas differ in their "
            "data and in which",
            "part of the optimizer is theirs, tensor and context ranks in which equal part of a "
            "matrix or row",
        ]
    writers = left if parallel.distributed_optimizer else ()
    if writers:
        reasons.append(
            f"of these {len(left)}, model, optimizer and checkpoint were built, without a step, to "
            "see what they save"
        )
    return Sample(tuple(chosen), tuple(reasons), writers)
