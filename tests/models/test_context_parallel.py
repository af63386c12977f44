"""Which tokens each context-parallel rank holds, against Megatron's own slicing."""

import pytest
import torch

from models.context_parallel import full_order, local_index


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[16], [8, 24, 16], [8] * 5])
def test_chunks_r_and_2cp_minus_1_minus_r(cp_size: int, lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    shares = []
    for rank in range(cp_size):
        expected = []
        for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
            chunks = torch.arange(start, start + length).chunk(2 * cp_size)
            if cp_size == 1:
                expected += chunks
            else:
                expected += [chunks[rank], chunks[2 * cp_size - 1 - rank]]
        share = local_index(cu_seqlens, cp_size, rank)
        assert share.dtype == torch.int64
        assert torch.equal(share, torch.cat(list(expected)))
        shares.append(share)
    row = torch.cat(shares)[full_order(cu_seqlens, cp_size)]
    assert torch.equal(row, torch.arange(sum(lengths)))


def test_indivisible_document_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"6 tokens .* stage\.document_multiple .* 4"):
        local_index(torch.tensor([0, 8, 14]), 2, 0)


def test_order_is_that_of_the_packed_rope() -> None:
    """Positions taken by `_get_thd_freqs_on_this_cp_rank` are the positions that we hold."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    cu_seqlens = torch.tensor([0, 8, 32])
    positions = torch.arange(24)
    for rank in range(2):
        held = local_index(cu_seqlens, 2, rank)
        taken = [
            _get_thd_freqs_on_this_cp_rank(rank, 2, torch.empty(length // 2), positions)
            for length in (8, 24)
        ]
        starts = torch.tensor([0] * 4 + [8] * 12)
        assert torch.equal(held - starts, torch.cat(taken))
