"""What an objective is: it turns a model's per-token losses into a sum and a count."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.batch import DeviceBatch

# (sum to differentiate, how many terms it has, sums to report)
LossOutput = tuple[Tensor, Tensor, dict[str, Tensor]]
LossFunction = Callable[[Tensor], LossOutput]


class Objective(Protocol):
    """Gradients are the sum over the global batch divided once by the global count.

    `loss` must return a sum and an integer count that add up over micro-batches, data-parallel
    and context-parallel ranks (`calculate_per_token_loss` of Megatron's schedules).
    """

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the sums in the report, beside `terms`, that are averaged and logged."""
        ...

    def loss(self, batch: DeviceBatch, token_losses_T: Tensor) -> LossOutput:
        """Sum, count and report of one micro-batch; `token_losses_T` is this rank's share."""
        ...


@dataclass(frozen=True)
class ForwardStepFunction:
    """The `forward_step_func` that Megatron's schedules call once per micro-batch."""

    objective: Objective

    def __call__(
        self, batches: Iterator[DeviceBatch], model: Callable[..., Tensor]
    ) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        output = model(**batch.model_inputs())
        return output, lambda token_losses: self.objective.loss(batch, token_losses)
