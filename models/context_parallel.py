"""Which tokens of a packed row each context-parallel rank holds.

Every document is cut into 2*cp equal chunks and rank r holds chunks r and 2*cp-1-r, so that
causal attention costs every rank the same. This is the layout that Transformer Engine expects for
packed (`thd`) sequences and that Megatron's packed RoPE assumes (rope_utils.py,
`_get_thd_freqs_on_this_cp_rank`).
"""

import torch
from torch import Tensor


def local_index(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Positions of the row that `cp_rank` holds, in the order in which it holds them.

    Args:
        cu_seqlens: int [D+1], where the documents begin, and the end of the last.
        cp_size: context-parallel ranks.
        cp_rank: this rank.

    Returns:
        int64 [T / cp_size], on the device of `cu_seqlens`.

    Raises:
        ValueError: a document's length is not a multiple of 2 * cp_size.
    """
    starts_D = cu_seqlens.long()[:-1]
    lengths_D = cu_seqlens.long().diff()
    if cp_size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    if bool((lengths_D % (2 * cp_size)).any()):
        odd = int(lengths_D[(lengths_D % (2 * cp_size)) > 0][0])
        raise ValueError(
            f"a document of {odd} tokens cannot be shared by {cp_size} context-parallel ranks; "
            f"set stage.document_multiple to a multiple of {2 * cp_size} and rebuild the plan"
        )
    chunks_D = lengths_D // (2 * cp_size)
    local_D = 2 * chunks_D
    # Within the rank's share of each document: offset of the token, and whether it is in the
    # document's second half (chunk 2*cp-1-r) or first (chunk r).
    begins_D = local_D.cumsum(0) - local_D
    chunk_T = chunks_D.repeat_interleave(local_D)
    offset_T = torch.arange(int(local_D.sum()), device=cu_seqlens.device)
    offset_T = offset_T - begins_D.repeat_interleave(local_D)
    second_T = offset_T >= chunk_T
    chunk_number_T = torch.where(second_T, 2 * cp_size - 1 - cp_rank, cp_rank)
    inside_T = torch.where(second_T, offset_T - chunk_T, offset_T)
    return starts_D.repeat_interleave(local_D) + chunk_number_T * chunk_T + inside_T


def full_order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    """Permutation that sorts the ranks' shares, laid end to end, back into the whole row.

    Returns:
        int64 [T]: `torch.cat(shares)[full_order(...)]` is the row.
    """
    held = torch.cat([local_index(cu_seqlens, cp_size, rank) for rank in range(cp_size)])
    return torch.argsort(held)
