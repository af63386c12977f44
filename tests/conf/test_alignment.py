"""Rows fit Transformer Engine's FP8 rule in every layout, and no smaller multiple would do."""

import itertools
from math import prod

import pytest

from conf.alignment import document_multiple, fp8_multiple, row_multiple
from conf.schema import ParallelConfig, PrecisionConfig

RECIPES = (None, "tensorwise", "delayed", "blockwise")
HIDDEN = 4096
GRID = [
    (tensor, sequence, context, recipe)
    for tensor, sequence, context, recipe in itertools.product(
        (1, 2, 4, 8), (False, True), (1, 2, 4, 8), RECIPES
    )
    if tensor > 1 or not sequence
]


def settings(
    tensor: int, sequence: bool, context: int, recipe: str | None
) -> tuple[ParallelConfig, PrecisionConfig]:
    parallel = ParallelConfig(
        world_size=tensor * context,
        tensor=tensor,
        context=context,
        sequence_parallel=sequence,
    )
    return parallel, PrecisionConfig(params="bf16", fp8_recipe=recipe)


def accepts(shape: tuple[int, ...]) -> bool:
    """Transformer Engine 2.11, pytorch/utils.py, `assert_dim_for_fp8_exec`."""
    return prod(shape[:-1]) % 8 == 0 and shape[-1] % 16 == 0


def quantizable(shape: tuple[int, ...]) -> bool:
    """The same, tensor/float8_blockwise_tensor.py, `Float8BlockQuantizer.is_quantizable`."""
    return shape[-1] % 128 == 0 and prod(shape[:-1]) % 128 == 0


def runs(tokens: int, tensor: int, sequence: bool, context: int, recipe: str | None) -> bool:
    """Whether a row of `tokens` can be shared out and multiplied."""
    if context > 1 and tokens % (2 * context):  # a chunk and its mirror image for every rank
        return False
    if tokens % (context * (tensor if sequence else 1)):
        return False
    gathered = tokens // context
    local = gathered // (tensor if sequence else 1)
    if recipe is None:
        return True
    for rows in (gathered, local):
        # Forward and input gradient have the features last, the weight gradient the tokens.
        if not (accepts((rows, 1, HIDDEN)) and accepts((HIDDEN, rows))):
            return False
        if recipe == "blockwise" and not quantizable((rows, 1, HIDDEN)):
            return False
    return True


@pytest.mark.parametrize(("tensor", "sequence", "context", "recipe"), GRID)
def test_the_multiple_is_enough_and_the_smallest(
    tensor: int, sequence: bool, context: int, recipe: str | None
) -> None:
    layout = (tensor, sequence, context, recipe)
    multiple = row_multiple(*settings(*layout))
    assert all(runs(multiple * times, *layout) for times in (1, 2, 3, 5, 7))
    assert not any(runs(tokens, *layout) for tokens in range(1, multiple))


def test_megatron_forgets_fp8_with_sequence_or_context_parallelism() -> None:
    from megatron.core.models.multimodal.context_parallel import get_padding

    wrong, right = [], []
    for tensor, sequence, context, recipe in GRID:
        if recipe is None:
            continue
        layout = (tensor, sequence, context, recipe)
        tokens = 8001
        theirs = tokens + get_padding(
            tokens, context, tensor, sequence, fp8_enabled=True, fp8_recipe=recipe
        )
        (right if runs(theirs, *layout) else wrong).append(layout)
        multiple = row_multiple(*settings(*layout))
        assert runs(-(-tokens // multiple) * multiple, *layout)
    # Where neither is used its 16 is enough, for the recipes without blocks of 128.
    assert {(s, c) for _, s, c, r in wrong if r != "blockwise"} >= {(True, 1), (False, 2)}
    assert (1, False, 1, "tensorwise") in right


def test_documents() -> None:
    for context, multiple in ((1, 1), (2, 4), (4, 8)):
        parallel, precision = settings(1, False, context, "tensorwise")
        assert document_multiple(parallel) == multiple
        # FP8 is about the row's total: the documents in it stay as long as they are.
        assert fp8_multiple(precision) == 16
