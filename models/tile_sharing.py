"""Context-parallel ranks share the tiles of a micro-batch.

Every rank of a context-parallel group gets the same tiles and needs the features of those of its
tokens, which lie anywhere. Each runs an equal share of the tiles through vision tower and
connector, and all features are gathered. The gather's backward pass sends every feature's gradient
to the rank that computed it, so the ranks' gradients of vision and connector weights add up to the
whole, as those of the decoder do.
"""

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def own_share(tiles_NCHW: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tiles: as many on every rank, black ones where there are too few.

    [N, C, height, width] -> [ceil(N / ranks), C, height, width].
    """
    ranks = group.size()
    if ranks == 1:
        return tiles_NCHW
    share = -(-len(tiles_NCHW) // ranks)
    own_NCHW = tiles_NCHW[group.rank() * share : (group.rank() + 1) * share]
    if len(own_NCHW) == share:
        return own_NCHW
    padded_NCHW = tiles_NCHW.new_zeros(share, *tiles_NCHW.shape[1:])
    padded_NCHW[: len(own_NCHW)] = own_NCHW
    return padded_NCHW


def gather_shares(features_NPH: Tensor, tiles: int, group: dist.ProcessGroup) -> Tensor:
    """Features of all `tiles` tiles, from those of this rank's share.

    [ceil(N / ranks), P, H] -> [N, P, H].
    """
    if group.size() == 1:
        return features_NPH
    gathered_NPH = gather_from_sequence_parallel_region(
        features_NPH.contiguous(), tensor_parallel_output_grad=True, group=group
    )
    return gathered_NPH[:tiles]
