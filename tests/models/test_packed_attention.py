"""The core attention against softmax(QK'/sqrt d)V written out, and its independence of packing."""

import pytest
import torch
from torch import Tensor

from conf.schema import ParallelConfig
from tests.distributed import megatron, run_ranks


def attention(causal: bool) -> object:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from models.packed_attention import PackedAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=24, num_attention_heads=4, attention_dropout=0.0
    )
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    return PackedAttention(config, 1, mask, "self")


def packed_params(lengths: list[int]) -> object:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def by_hand(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """[T, N, D], [T, G, D] -> [T, N*D], in float64."""
    repeat = query.shape[1] // key.shape[1]
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(repeat, dim=0) for x in (key, value))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[12], [1, 5, 2, 12], [3, 3, 3]])
def test_packed_is_causal_within_each_document(groups: int, lengths: list[int]) -> None:
    total = sum(lengths)
    torch.manual_seed(0)
    query, key, value = (torch.randn(total, heads, 6) for heads in (4, groups, groups))
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (numbers[:, None] == numbers) & torch.ones(total, total).tril().bool()
    found = attention(True)(query, key, value, None, packed_seq_params=packed_params(lengths))
    assert found.shape == (total, 1, 24)
    assert torch.allclose(found[:, 0].double(), by_hand(query, key, value, allowed), atol=1e-6)


def test_a_document_does_not_depend_on_its_neighbours_bit_for_bit() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(300, heads, 6) for heads in (4, 2, 2))
    row = attention(True)(query, key, value, None, packed_seq_params=packed_params([100, 130, 70]))
    alone = attention(True)(
        query[100:230],
        key[100:230],
        value[100:230],
        None,
        packed_seq_params=packed_params([130]),
    )
    assert torch.equal(row[100:230], alone)


def test_vision_batch_is_unmasked() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, 3, 4, 6) for _ in range(3))
    found = attention(False)(query, key, value, None)
    for tile in range(3):
        expected = by_hand(*(x[:, tile] for x in (query, key, value)), torch.ones(9, 9).bool())
        assert torch.allclose(found[:, tile].double(), expected, atol=1e-6)


def _context_worker(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Output and key gradient of this rank's share of a row, and which tokens they are."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from models.context_parallel import local_index
    from models.packed_attention import PackedAttention

    with megatron(ParallelConfig(2, context=2)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=24,
            num_attention_heads=4,
            attention_dropout=0.0,
            context_parallel_size=2,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        layer = PackedAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
        params = packed_params(lengths)
        rank = parallel_state.get_context_parallel_rank()
        held = local_index(params.cu_seqlens_q, 2, rank)
        query, key, value = (x[held] for x in _row(sum(lengths)))
        key.requires_grad_(True)
        out = layer(query, key, value, None, packed_seq_params=params)
        out.square().sum().backward()
        assert key.grad is not None
        return out.detach(), key.grad


def _row(total: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(total, heads, 6, generator=draw) for heads in (4, 2, 2)]


def test_context_parallel_equals_the_whole_row() -> None:
    from models.context_parallel import full_order

    lengths = [8, 20, 4]
    answers = run_ranks(2, _context_worker, lengths)
    order = full_order(packed_params(lengths).cu_seqlens_q, 2)
    found = torch.cat([out for out, _ in answers])[order]
    found_grad = torch.cat([grad for _, grad in answers])[order]
    query, key, value = _row(sum(lengths))
    key.requires_grad_(True)
    expected = attention(True)(query, key, value, None, packed_seq_params=packed_params(lengths))
    expected.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found_grad, key.grad, atol=1e-5)
