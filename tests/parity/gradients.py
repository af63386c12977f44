"""The reference of the gradient tests, and the comparison with it.

The reference is the mean over the batch's target tokens, each document run alone through
transformers 4.57.6, differentiated by torch. Tolerances: loss 1e-5 absolute; every gradient tensor
2e-5 of its norm in relative norm (float32; sums of some thousand terms taken in another order), and
no element farther off than 1e-5 of the largest gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig, ParallelConfig
from tests.distributed import run_ranks
from tests.models.tiny import (
    Document,
    documents,
    hf_gradients,
    hf_loss,
    hf_twin,
    megatron_state,
    micro_batch,
)
from tests.parity.layouts import gradients_worker

LENGTH = 256
EVERYTHING = ("vision", "connector", "language")
PREFIXES = {
    "vision": ("vision_tower.",),
    "connector": ("connector.", "image_newline"),
    "language": ("language_model.",),
}


@dataclass(frozen=True)
class Reference:
    """A network, its weights, and what transformers computes with it."""

    model: ModelConfig
    state: dict[str, Tensor]
    documents: list[Document]
    loss: float
    gradients: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: ModelConfig) -> "Reference":
        """Random weights and the documents of tests.models.tiny."""
        twin = hf_twin(model)
        docs = documents(model)
        loss = hf_loss(twin, docs)
        loss.backward()
        state = megatron_state(twin, model)
        return cls(model, state, docs, float(loss.detach()), hf_gradients(twin, model))

    def batches(self, packs: Sequence[Sequence[int]], size: int = 1) -> list[dict[str, Any]]:
        """Micro-batches of `size` packs of these document numbers."""
        rows = [[self.documents[number] for number in pack] for pack in packs]
        return [
            micro_batch(self.model, rows[first : first + size], LENGTH)
            for first in range(0, len(rows), size)
        ]

    def of_modules(self, trained: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of these modules that are ever trained.

        The last vision layer and the norm after it are not: they lie outside DDP.
        """
        prefixes = tuple(prefix for name in trained for prefix in PREFIXES[name])
        unused = ("vision_tower.unused", "vision_tower.post")
        assert all(not g.any() for n, g in self.gradients.items() if n.startswith(unused))
        return {
            name: gradient
            for name, gradient in self.gradients.items()
            if name.startswith(prefixes) and not name.startswith(unused)
        }


def merged(answers: Sequence[tuple]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the last stages' ranks; the stages' gradients together, ranks agreeing."""
    gradients: dict[str, Tensor] = {}
    for _, some in answers:
        for name, gradient in some.items():
            known = gradients.setdefault(name, gradient)
            assert torch.allclose(known, gradient, rtol=0, atol=1e-7), f"ranks disagree on {name}"
    return [loss for loss, _ in answers if loss is not None], gradients


def assert_same_gradients(
    reference: Reference,
    parallel: ParallelConfig,
    packs: Sequence[Sequence[int]],
    size: int = 1,
    trained: Sequence[str] = EVERYTHING,
) -> None:
    """One global batch under `parallel`: the loss and gradients of transformers."""
    answers = run_ranks(
        parallel.world_size,
        gradients_worker,
        reference.model,
        parallel,
        reference.state,
        reference.batches(packs, size),
        trained,
    )
    losses, gradients = merged(answers)
    expected = reference.of_modules(trained)
    assert losses and set(gradients) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    loss_error = max(abs(loss - reference.loss) for loss in losses)
    error = max(float((gradients[n] - expected[n]).abs().max()) for n in gradients)
    relative = {
        n: float((gradients[n] - expected[n]).norm() / expected[n].norm()) for n in gradients
    }
    worst = max(relative, key=lambda name: relative[name])
    print(
        f"loss {losses[0]:.6f} off by {loss_error:.1e}; gradients off by {error:.1e} "
        f"(largest {largest:.2f}); worst tensor {relative[worst]:.1e} {worst}"
    )
    assert loss_error < 1e-5
    assert error < 1e-5 * largest
    assert relative[worst] < 2e-5
