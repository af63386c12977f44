"""Typed configuration -> Megatron's `TransformerConfig`, for the decoder and the vision tower."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models import layer_specs
from models.fp8 import fp8_settings
from models.pipeline_layout import pipeline_settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    """The decoder's. Only the `block` method leaves layers alone, and only `full` counts layers."""
    if parallel.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(parallel.recompute_modules),
        }
    if parallel.recompute == "full" and parallel.recompute_layers is not None:
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": parallel.recompute_layers,
        }
    return _whole_layers() if parallel.recompute == "full" else {}


def _whole_layers() -> dict[str, Any]:
    """Every layer keeps its input only."""
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _common(parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """What decoder and vision tower share."""
    dtype = DTYPES[precision.params]
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision.params == "bf16",
        # Initial weights then do not depend on the layout: each rank draws the whole matrix and
        # keeps its part.
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
    }


def language_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Llama decoder.

    Raises:
        ConfigError: the pipeline split does not add up, or this machine has no FP8 (Megatron
            would train in BF16 without a word).
    """
    text = model.text
    extra = {**pipeline_settings(model, parallel), **fp8_settings(precision)}
    fused = layer_specs.uses_transformer_engine()
    return TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.heads,
        num_query_groups=text.kv_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,  # SwiGLU in one kernel
        **extra,
        **_recompute(parallel),
        **_common(parallel, precision),
    )


def vision_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """SigLIP encoder, `model.vision.layers_used` layers.

    One pipeline stage, tokens whole on every rank, never FP8: 729 patches, and 4304 channels over
    two ranks, are not multiples of 16. Where the decoder recomputes, the tower does it with whole
    layers, whatever the decoder's choice: its 27 tiles of a 16k row would keep 16 GB, and it is a
    fiftieth of the work. A frozen tower has no backward pass, so nothing is computed again.
    """
    vision = model.vision
    fused = layer_specs.uses_transformer_engine()
    # Megatron's fused bias and GELU is the tanh approximation under the exact one's name.
    gelu = F.gelu if fused else functools.partial(F.gelu, approximate="tanh")
    return TransformerConfig(
        num_layers=vision.layers_used,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=gelu,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,  # here there is a bias to add; the decoder has none
        add_bias_linear=True,
        add_qkv_bias=True,
        **(_whole_layers() if parallel.recompute != "none" else {}),
        **_common(parallel, precision),
    )
