"""What is kept of a simulated rank: plain values that travel between processes."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in the layout."""

    tensor: int
    context: int
    data: int
    pipeline: int

    def __str__(self) -> str:
        return f"tp{self.tensor} cp{self.context} dp{self.data} pp{self.pipeline}"


@dataclass(frozen=True)
class Group:
    """A process group that this rank is a member of."""

    kind: str  # Megatron's name for it, as "TENSOR_MODEL_PARALLEL_GROUP"
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        ranks = self.ranks
        shown = ", ".join(map(str, ranks))
        if len(ranks) > 8:
            shown = f"{', '.join(map(str, ranks[:3]))}, ... {ranks[-1]}: {len(ranks)} ranks"
        return f"{short_kind(self.kind)} [{shown}]"


def short_kind(kind: str) -> str:
    """Megatron's name of a group without the words that all have."""
    if kind in ("default_pg", "undefined", ""):
        return "world"
    return kind.removesuffix("_GROUP").replace("_MODEL_PARALLEL", "").lower()


@dataclass(frozen=True)
class Call:
    """What a rank asked of a group; all members must ask the same in the same order."""

    group: int  # position in RankReport.groups
    op: str
    dtype: str
    shape: tuple[int, ...]  # of what this rank gives (all-gather) or gets (reduce-scatter)
    peer: int | None  # rank at the other end of a send or receive; a broadcast's source
    phase: str  # groups, model, optimizer, reference, step, checkpoint
    place: str  # where in Megatron, and where in this project

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def point_to_point(self) -> bool:
        """Whether two ranks only take part."""
        return self.op in ("send", "recv")

    @property
    def signature(self) -> tuple[str, str, int, int | None]:
        """What the other members' calls must equal."""
        return self.op, self.dtype, self.numel, self.peer

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "1"
        peer = "" if self.peer is None else f" ({self.peer})"
        return f"{self.op}{peer} {self.dtype} [{shape}]".replace("  ", " ")


@dataclass(frozen=True)
class Shard:
    """A rank's piece of a tensor (or object) of the checkpoint."""

    key: str
    dtype: str  # "object" for what is pickled
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    main: bool  # this rank is the one of its replicas that writes it


@dataclass(frozen=True)
class ModulePart:
    """What a rank holds of the vision tower, the connector or the language model."""

    parameters: int = 0
    trainable: int = 0
    with_gradient: int = 0  # elements that have a place in a gradient buffer
    optimised: int = 0  # elements of parameters that this rank's optimizer knows
    untouched: tuple[str, ...] = ()  # trainable parameters that no backward pass reached


@dataclass
class RankReport:
    """Everything that was seen of one rank."""

    rank: int
    coordinates: Coordinates
    groups: list[Group] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    modules: dict[str, ModulePart] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)  # weights, gradients, optimizer
    shards: list[Shard] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # numbers that do not exist, by place
    kinds: tuple[str, ...] = ()  # of its micro-batches
    seconds: float = 0.0
    error: str = ""  # it did not come to the end
