"""Combinations of parallelisms against transformers: every pair of sizes that eight ranks allow.

Tensor 1/2/4, pipeline 1/2/4 with and without virtual stages, context 1/2/4, two replicas; all
documents packed, image counts unequal from micro-batch to micro-batch or one replica without any
image; everything trained, the vision tower frozen, or the connector only. Reference and tolerances:
gradients.py.
"""

import itertools

import pytest

from conf.schema import ParallelConfig
from tests.models.tiny import tiny_model
from tests.parity.gradients import EVERYTHING, Reference, assert_same_gradients

# Four micro-batches, as the interleaved schedule wants of four stages. Images in each: 2, 2, 1, 2;
# and 4, 0, 3, 0, so that the second of two replicas has none.
IMAGES = [[0, 1], [2, 3, 4], [5], [6, 7]]
TEXT_REPLICA = [[0, 2, 3], [1, 4], [5, 7], [6]]
FROZEN_VISION = ("connector", "language")
CONNECTOR = ("connector",)
MOST_RANKS = 8


def layout(
    tensor: int = 1, pipeline: int = 1, virtual: int = 1, context: int = 1, data: int = 1
) -> ParallelConfig:
    """With sequence parallelism wherever there is tensor parallelism, and overlap with replicas."""
    return ParallelConfig(
        tensor * pipeline * context * data,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        sequence_parallel=tensor > 1,
        overlap_grad_reduce=data > 1,
    )


CASES = {
    "TP4": (layout(tensor=4), IMAGES, EVERYTHING),
    "PP4": (layout(pipeline=4), IMAGES, FROZEN_VISION),
    "PP4xVPP2": (layout(pipeline=4, virtual=2), IMAGES, EVERYTHING),
    "CP4": (layout(context=4), IMAGES, EVERYTHING),
    "PP2xVPP4 connector": (layout(pipeline=2, virtual=4), IMAGES, CONNECTOR),
    "PP2xVPP2xDP2": (layout(pipeline=2, virtual=2, data=2), TEXT_REPLICA, EVERYTHING),
    "TP2xPP2xVPP2": (layout(tensor=2, pipeline=2, virtual=2), IMAGES, FROZEN_VISION),
    "CP2xPP2xVPP2": (layout(pipeline=2, virtual=2, context=2), IMAGES, EVERYTHING),
    "CP2xDP2": (layout(context=2, data=2), TEXT_REPLICA, EVERYTHING),
    "TP2xDP2 connector": (layout(tensor=2, data=2), TEXT_REPLICA, CONNECTOR),
    "TP4xPP2xVPP2": (layout(tensor=4, pipeline=2, virtual=2), IMAGES, EVERYTHING),
    "TP4xCP2": (layout(tensor=4, context=2), IMAGES, FROZEN_VISION),
    "TP4xDP2": (layout(tensor=4, data=2), TEXT_REPLICA, EVERYTHING),
    "TP2xPP4xVPP2": (layout(tensor=2, pipeline=4, virtual=2), IMAGES, EVERYTHING),
    "TP2xCP4": (layout(tensor=2, context=4), IMAGES, EVERYTHING),
    "CP4xPP2xVPP2": (layout(pipeline=2, virtual=2, context=4), IMAGES, FROZEN_VISION),
    "CP4xDP2": (layout(context=4, data=2), TEXT_REPLICA, EVERYTHING),
    "CP2xPP4xVPP2": (layout(pipeline=4, virtual=2, context=2), IMAGES, EVERYTHING),
    "PP4xDP2": (layout(pipeline=4, data=2), TEXT_REPLICA, EVERYTHING),
    "TP2xPP2xCP2": (layout(tensor=2, pipeline=2, context=2), IMAGES, EVERYTHING),
}


def test_every_pair_is_covered() -> None:
    """Each two of the four parallelisms in each two of their sizes, where eight ranks do."""
    sizes = {"tensor": (2, 4), "pipeline": (2, 4), "context": (2, 4), "data": (2,)}
    found = [{name: getattr(parallel, name) for name in sizes} for parallel, _, _ in CASES.values()]
    for (one, ones), (other, others) in itertools.combinations(sizes.items(), 2):
        for a, b in itertools.product(ones, others):
            if a * b <= MOST_RANKS:
                assert any(case[one] == a and case[other] == b for case in found), (
                    one,
                    a,
                    other,
                    b,
                )


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Eight decoder layers and four groups of queries: one layer a chunk, one group a rank."""
    return Reference.of(tiny_model(layers=8, heads=8, kv_heads=4))


@pytest.mark.parametrize("case", CASES)
def test_same_loss_and_gradients(case: str, reference: Reference) -> None:
    parallel, packs, trained = CASES[case]
    assert_same_gradients(reference, parallel, packs, trained=trained)
