"""Logits against transformers 4.57.6, random weights, float32, under every parallel layout.

Stated tolerance: 1e-4 of absolute difference on logits of order 10. Both sides do the same
float32 operations but for the order of summation: over tensor-parallel ranks, and inside matrix
products, whose blocking depends on the number of rows.
"""

import pytest
import torch

from conf.schema import ParallelConfig
from tests.distributed import run_ranks
from tests.models.tiny import documents, hf_logits, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import logits_worker

TOLERANCE = 1e-4
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(world_size=2, tensor=2),
    "TP2+SP": ParallelConfig(world_size=2, tensor=2, sequence_parallel=True),
    "PP2": ParallelConfig(world_size=2, pipeline=2),
    "PP2 uneven": ParallelConfig(world_size=2, pipeline=2, pipeline_layers=[1, 3]),
    "PP2xVPP2": ParallelConfig(world_size=2, pipeline=2, virtual_pipeline=2),
    "TP2xPP2": ParallelConfig(world_size=4, tensor=2, pipeline=2),
    "TP2xPP2+SP": ParallelConfig(world_size=4, tensor=2, pipeline=2, sequence_parallel=True),
    "CP2": ParallelConfig(world_size=2, context=2),
    "CP2xTP2+SP": ParallelConfig(world_size=4, context=2, tensor=2, sequence_parallel=True),
}


@pytest.fixture(scope="module")
def reference() -> tuple:
    model = tiny_model()
    twin = hf_twin(model)
    docs = documents(model)
    with torch.no_grad():
        logits = [hf_logits(twin, document) for document in docs]
    return model, megatron_state(twin, model), docs, logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_each_document_alone(layout: str, reference: tuple) -> None:
    """Odd sizes, several images, text only, two packs laid end to end: one row for us."""
    model, state, docs, expected = reference
    parallel = LAYOUTS[layout]
    batch = micro_batch(model, [docs[:4], docs[4:]], length=512)
    answers = run_ranks(parallel.world_size, logits_worker, model, parallel, state, batch)
    found = [logits for logits in answers if logits is not None]
    assert len(found) == parallel.world_size // parallel.pipeline
    starts = [0, *torch.tensor([len(d.tokens) for d in docs[:4]]).cumsum(0).tolist()[:3]]
    starts += [512 + s for s in [0, *torch.tensor([len(d.tokens) for d in docs[4:]]).cumsum(0)[:3]]]
    for logits in found:
        worst = max(
            float((logits[start : start + len(want)] - want).abs().max())
            for start, want in zip(starts, expected, strict=True)
        )
        print(f"{layout}: max |logit difference| {worst:.2e}")
        assert worst < TOLERANCE
    assert max(float(want.abs().max()) for want in expected) > 2  # no trivial logits


@pytest.mark.parametrize("number", range(8))
def test_one_document_a_row(number: int, reference: tuple) -> None:
    """Text only, one image, several images, without padding and alone in the row."""
    model, state, docs, expected = reference
    document = docs[number]
    batch = micro_batch(model, [[document]], length=len(document.tokens))
    (logits,) = run_ranks(1, logits_worker, model, ParallelConfig(), state, batch)
    worst = float((logits - expected[number]).abs().max())
    print(f"document {number}: max |logit difference| {worst:.2e}")
    assert worst < TOLERANCE
