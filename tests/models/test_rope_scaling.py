"""Stretched RoPE against transformers: the frequencies, and the logits of the whole network."""

from dataclasses import replace

import pytest
import torch

from conf.schema import ParallelConfig
from conf.schema.model import RopeScaling
from models.rope_scaling import scaled_frequencies
from tests.distributed import run_ranks
from tests.models.tiny import documents, hf_logits, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import logits_worker
from tools.hf_config import stated_scaling

SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 3.0, 1.5, 6.0, 64),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_are_transformers_own(scaling: RopeScaling) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        rope_theta=5e5,
        rope_scaling=stated_scaling(scaling),
        max_position_embeddings=1024,
    )
    plain = 1.0 / 5e5 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.equal(scaled_frequencies(plain, scaling), LlamaRotaryEmbedding(config).inv_freq)


def test_logits_are_transformers_own() -> None:
    """At most 1e-4 apart, as in tests/parity; without the scaling they are not."""
    model = tiny_model()
    model = replace(model, text=replace(model.text, rope_scaling=SCALINGS[2]))
    twin = hf_twin(model)
    docs = documents(model)
    with torch.no_grad():
        expected = [hf_logits(twin, document) for document in docs]
    state = megatron_state(twin, model)
    batch = micro_batch(model, [docs], 1024)
    (logits,) = run_ranks(1, logits_worker, model, ParallelConfig(), state, batch)
    plain = replace(model, text=replace(model.text, rope_scaling=RopeScaling()))
    (other,) = run_ranks(1, logits_worker, plain, ParallelConfig(), state, batch)
    starts = batch["cu_seqlens"].tolist()
    for start, wanted in zip(starts, expected, strict=False):
        rows = slice(start, start + len(wanted))
        assert float((logits[rows] - wanted).abs().max()) < 1e-4
        assert float((other[rows] - wanted).abs().max()) > 1e-2
