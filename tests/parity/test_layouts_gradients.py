"""One global batch, one loss, one set of gradients: every way to cut it on up to four ranks.

More ranks and combinations: test_layout_matrix.py. Reference and tolerances: gradients.py.
"""

from dataclasses import replace

import pytest
import torch

from conf.schema import ParallelConfig
from tests.distributed import run_ranks
from tests.models.tiny import micro_batch, tiny_model
from tests.parity.gradients import LENGTH, Reference, assert_same_gradients, merged
from tests.parity.layouts import gradients_worker

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
def reference() -> Reference:
    return Reference.of(tiny_model())


@pytest.mark.parametrize("case", CASES)
def test_same_loss_and_gradients(case: str, reference: Reference) -> None:
    parallel, packs, size = CASES[case]
    assert_same_gradients(reference, parallel, packs, size)


def test_text_only_replica_takes_part(reference: Reference) -> None:
    """One replica sees no image: the other's collectives must not wait, and zeros must add."""
    model, state, docs = reference.model, reference.state, reference.documents
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
def test_stage_one_trains_the_connector_only(layout: ParallelConfig, reference: Reference) -> None:
    """Both towers frozen (the second pipeline stage has nothing to train)."""
    assert_same_gradients(reference, layout, PACKED, trained=["connector"])
