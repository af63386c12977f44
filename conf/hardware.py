"""What a job found on its node, as the checks of a configuration want it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a node and the software that FP8 needs."""

    cuda: bool
    capability: tuple[int, int] | None = None  # of the first GPU
    transformer_engine: bool = False
