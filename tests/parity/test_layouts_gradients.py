"""One global batch, one loss, one set of gradients: every layout against transformers 4.57.6.

The reference is the mean over the batch's target tokens, each document run alone through
transformers, differentiated by torch. Stated tolerances: loss 1e-5 absolute; every gradient tensor
2e-5 of its norm in relative norm (float32; sums of some thousand terms taken in another order), and
no element farther off than 1e-5 of the largest gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from conf.schema import ParallelConfig
from tests.distributed import run_ranks
from tests.models.tiny import (
    Document,
    documents,
    hf_gradients,
    hf_loss,
    hf_twin,
    megatron_state,
    micro_batch,
    tiny_model,
)
from tests.parity.layouts import gradients_worker

LENGTH = 256
PACKED = [[0, 1], [2, 3, 4], [5], [6, 7]]
UNPACKED = [[number] for number in range(8)]

# name -> (layout, packs of document numbers, packs per micro-batch)
ONE = ParallelConfig()
CASES: dict[str, tuple] = {
    "TP1": (ONE, PACKED, 1),
    "micro-batch 2": (ONE, PACKED, 2),
    "micro-batch 4": (ONE, PACKED, 4),
    "unpacked": (ONE, UNPACKED, 1),
    "unpacked, micro-batch 4": (ONE, UNPACKED, 4),
    "recompute full": (replace(ONE, recompute="full"), PACKED, 1),
    "recompute selective": (replace(ONE, recompute="selective"), PACKED, 1),
    "TP2": (ParallelConfig(2, tensor=2), PACKED, 1),
    "TP2+SP": (ParallelConfig(2, tensor=2, sequence_parallel=True), PACKED, 1),
    "TP2+SP recompute full": (
        ParallelConfig(2, tensor=2, sequence_parallel=True, recompute="full"),
        PACKED,
        1,
    ),
    "PP2": (ParallelConfig(2, pipeline=2), PACKED, 1),
    "PP2 uneven": (ParallelConfig(2, pipeline=2, pipeline_layers=[1, 3]), PACKED, 1),
    "DP2": (ParallelConfig(2), PACKED, 1),
    "DP2 overlapped": (ParallelConfig(2, overlap_grad_reduce=True), PACKED, 1),
    "PP2xVPP2": (ParallelConfig(2, pipeline=2, virtual_pipeline=2), PACKED, 1),
    "CP2": (ParallelConfig(2, context=2), PACKED, 1),
    "CP2 unpacked": (ParallelConfig(2, context=2), UNPACKED, 1),  # some rows without images
    "CP2 recompute selective": (
        ParallelConfig(2, context=2, recompute="selective"),
        PACKED,
        2,
    ),
    "TP2xPP2+SP": (
        ParallelConfig(4, tensor=2, pipeline=2, sequence_parallel=True),
        PACKED,
        1,
    ),
    "CP2xTP2+SP": (
        ParallelConfig(4, tensor=2, context=2, sequence_parallel=True),
        PACKED,
        1,
    ),
    "PP2xDP2, micro-batch 2, unpacked": (ParallelConfig(4, pipeline=2), UNPACKED, 2),
    "loss by 16 tokens": (replace(ONE, loss_chunk=16), PACKED, 2),
    "TP2xPP2+SP, loss by 13 tokens": (
        ParallelConfig(4, tensor=2, pipeline=2, sequence_parallel=True, loss_chunk=13),
        PACKED,
        1,
    ),
    "CP2xTP2, loss by 16 tokens": (
        ParallelConfig(4, tensor=2, context=2, loss_chunk=16),
        PACKED,
        1,
    ),
}


@pytest.fixture(scope="module")
def reference() -> tuple:
    model = tiny_model()
    twin = hf_twin(model)
    docs = documents(model)
    loss = hf_loss(twin, docs)
    loss.backward()
    return model, megatron_state(twin, model), docs, float(loss), hf_gradients(twin, model)


def merged(answers: Sequence[tuple]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the last stages' ranks; the stages' gradients together, ranks agreeing."""
    gradients: dict[str, torch.Tensor] = {}
    for _, some in answers:
        for name, gradient in some.items():
            known = gradients.setdefault(name, gradient)
            assert torch.allclose(known, gradient, rtol=0, atol=1e-7), f"ranks disagree on {name}"
    return [loss for loss, _ in answers if loss is not None], gradients


def batches(model: object, docs: list[Document], packs: list, size: int) -> list[dict]:
    rows = [[docs[number] for number in pack] for pack in packs]
    return [
        micro_batch(model, rows[first : first + size], LENGTH)  # type: ignore[arg-type]
        for first in range(0, len(rows), size)
    ]


@pytest.mark.parametrize("case", CASES)
def test_same_loss_and_gradients(case: str, reference: tuple) -> None:
    model, state, docs, expected_loss, expected = reference
    parallel, packs, size = CASES[case]
    answers = run_ranks(
        parallel.world_size,
        gradients_worker,
        model,
        parallel,
        state,
        batches(model, docs, packs, size),
    )
    losses, gradients = merged(answers)
    # never trained, hence outside DDP: the last vision layer and the norm after it
    unused = {n for n in expected if n.startswith(("vision_tower.unused", "vision_tower.post"))}
    assert unused and set(gradients) == set(expected) - unused
    assert all(not expected[name].any() for name in unused)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    loss_error = max(abs(loss - expected_loss) for loss in losses)
    error = max(float((gradients[n] - expected[n]).abs().max()) for n in gradients)
    relative = {
        n: float((gradients[n] - expected[n]).norm() / expected[n].norm()) for n in gradients
    }
    worst = max(relative, key=lambda name: relative[name])
    print(
        f"{case}: loss {losses[0]:.6f} off by {loss_error:.1e}; gradients off by {error:.1e} "
        f"(largest {largest:.2f}); worst tensor {relative[worst]:.1e} {worst}"
    )
    assert loss_error < 1e-5
    assert error < 1e-5 * largest
    assert relative[worst] < 2e-5


def test_text_only_replica_takes_part(reference: tuple) -> None:
    """One replica sees no image: the other's collectives must not wait, and zeros must add."""
    model, state, docs, _, _ = reference
    text = [d for d in docs if not d.sizes]
    images = [d for d in docs if d.sizes]
    packs = [[images[0]], [text[0]], [images[1]], [text[1]]]
    rows = [micro_batch(model, [pack], LENGTH) for pack in packs]
    one = merged(run_ranks(1, gradients_worker, model, ONE, state, rows))
    two = merged(
        run_ranks(
            2,
            gradients_worker,
            model,
            ParallelConfig(2, overlap_grad_reduce=True),
            state,
            rows,
        )
    )
    assert max(abs(loss - one[0][0]) for loss in two[0]) < 1e-5
    for name, gradient in one[1].items():
        assert torch.allclose(two[1][name], gradient, rtol=1e-4, atol=1e-6), name
    assert float(one[1]["connector.linear_fc1.weight"].abs().max()) > 1e-4


STAGE_ONE = {
    "PP1": ONE,
    "PP2": ParallelConfig(2, pipeline=2),
    "CP2": ParallelConfig(2, context=2),
    "TP2+SP, loss by 16 tokens": ParallelConfig(2, tensor=2, sequence_parallel=True, loss_chunk=16),
}


@pytest.mark.parametrize("layout", STAGE_ONE.values(), ids=STAGE_ONE)
def test_stage_one_trains_the_connector_only(layout: ParallelConfig, reference: tuple) -> None:
    """Both towers frozen (the second pipeline stage has nothing to train)."""
    model, state, docs, _, expected = reference
    answers = run_ranks(
        layout.world_size,
        gradients_worker,
        model,
        layout,
        state,
        batches(model, docs, PACKED, 1),
        ["connector"],
    )
    _, gradients = merged(answers)
    assert set(gradients) == {
        "image_newline",
        *(f"connector.linear_fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    }
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-4, name
