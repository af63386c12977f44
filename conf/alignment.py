"""What the lengths of rows and documents must be multiples of; the only place that knows.

A micro-batch is one row of T tokens. Context parallelism cuts each of its documents into 2*cp
chunks; every rank then holds T / cp tokens, and T / (cp * tp) of them with sequence parallelism.
FP8 asks something of that local number, not of T: Transformer Engine (2.11, pytorch/utils.py,
`assert_dim_for_fp8_exec`) wants all dimensions but the last to multiply to 8 and the last to 16,
and the matrix product of the weight gradient has the tokens last. Blockwise scales are shared by
128 values, and a sequence-parallel rank must hold whole blocks (`assert_dim_for_all_gather`).
Megatron's own `get_padding` (models/multimodal/context_parallel.py) forgets FP8 where there is
sequence or context parallelism.
"""

from math import lcm

from conf.schema.parallel import ParallelConfig
from conf.schema.precision import PrecisionConfig

# Of the local rows (tokens) and columns (features) of a matrix product, by recipe.
FP8_MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 128}


def ranks_of_row(parallel: ParallelConfig) -> int:
    """Ranks that hold a part each of one row's tokens between the layers."""
    return parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)


def fp8_multiple(precision: PrecisionConfig) -> int:
    """What rows and columns of the language model's matrices, on one rank, are multiples of."""
    if precision.fp8_recipe is None:
        return 1
    # An unknown recipe is refused elsewhere; the strictest here keeps its message the only one.
    return FP8_MULTIPLES.get(precision.fp8_recipe, max(FP8_MULTIPLES.values()))


def document_multiple(parallel: ParallelConfig) -> int:
    """What each document of a row, in tokens, must be a multiple of."""
    return 2 * parallel.context if parallel.context > 1 else 1


def row_multiple(parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """What the tokens of one micro-batch must be a multiple of."""
    return lcm(document_multiple(parallel), ranks_of_row(parallel) * fp8_multiple(precision))
