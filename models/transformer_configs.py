"""Typed configuration -> Megatron's `TransformerConfig`, for the decoder and the vision tower."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from conf.schema.errors import ConfigError
from models.pipeline_layout import pipeline_settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _recompute(choice: str) -> dict[str, Any]:
    if choice == "full":  # keep each layer's input only
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if choice == "selective":  # recompute the attention core only
        return {"recompute_granularity": "selective"}
    return {}


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
        **_recompute(parallel.recompute),
    }


def language_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Llama decoder.

    Raises:
        ConfigError: the pipeline split does not add up, or FP8 without a GPU (Megatron would run
            in BF16 without a word).
    """
    text = model.text
    extra = pipeline_settings(model, parallel)
    if precision.fp8_recipe is not None:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"precision.fp8_recipe={precision.fp8_recipe} needs a GPU of compute capability "
                "8.9 or more; set precision.fp8_recipe=null"
            )
        extra.update(fp8="hybrid", fp8_recipe=precision.fp8_recipe)
        if precision.fp8_recipe == "delayed":
            extra.update(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
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
        apply_rope_fusion=torch.cuda.is_available(),
        **extra,
        **_common(parallel, precision),
    )


def vision_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """SigLIP encoder, `model.vision.layers_used` layers.

    One pipeline stage, tokens whole on every rank, never FP8: 729 patches, and 4304 channels over
    two ranks, are not multiples of 16.
    """
    vision = model.vision
    return TransformerConfig(
        num_layers=vision.layers_used,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common(parallel, precision),
    )
