"""The 9B model's layer shapes, cut to two layers on each side, against transformers 4.57.6.

Vocabulary cut to 2048 rows for memory (below 6 GB). Tolerance 1e-4 on logits of order 10: sums
run over 4096 and 12288 terms in float32.
"""

import resource

import pytest
import torch

from conf.schema import ModelConfig, ParallelConfig, TextConfig, VisionConfig
from tests.distributed import megatron, run_ranks
from tests.models.tiny import hf_logits, hf_twin, make_document, megatron_state, micro_batch
from tests.parity.layouts import NOT_INPUTS, build_loaded


def shapes() -> ModelConfig:
    """SigLIP2 so400m and EuroLLM-9B, two used layers each, one vision layer carried unused."""
    return ModelConfig(
        name="amalia-vl-9b-two-layers",
        vision=VisionConfig(1152, 4304, 3, 16, image_size=384, patch_size=16),
        text=TextConfig(4096, 12288, 2, 32, 8, 128, vocab_size=2048, max_positions=4096),
        image_token_id=2047,
    )


def real_shapes_worker() -> tuple[float, float, int, float]:
    """Largest logit difference, largest logit, tokens, peak memory in GB."""
    torch.set_num_threads(2)
    model = shapes()
    document = make_document(model, [(37, 290)], text=40, seed=1)
    with torch.no_grad():
        twin = hf_twin(model)
        expected = hf_logits(twin, document)
        state = megatron_state(twin, model)
        del twin
        with megatron(ParallelConfig()):
            built = build_loaded(model, ParallelConfig(), state)
            del state
            batch = micro_batch(model, [[document]], len(document.tokens))
            inputs = {n: v for n, v in batch.items() if n not in (*NOT_INPUTS, "labels_T")}
            found = built(**inputs)
    torch.set_num_threads(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    worst = float((found - expected).abs().max())
    return worst, float(expected.abs().max()), len(document.tokens), peak


@pytest.mark.slow
def test_two_layers_of_the_real_shapes() -> None:
    ((worst, largest, tokens, peak),) = run_ranks(1, real_shapes_worker, timeout=400)
    print(f"{tokens} tokens, |difference| {worst:.1e} of {largest:.1f}, {peak:.1f} GB")
    assert worst < 1e-4 and largest > 2
    assert peak < 6
