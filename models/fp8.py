"""FP8 matrix products in the language model's transformer layers, by Transformer Engine.

Embedding, output layer, norms, attention, vision tower and connector stay in the parameters'
dtype. Megatron-core trains in BF16 without a word where Transformer Engine is missing, hence the
two checks here: before the layers are built, and of what was built.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context, is_first_last_bf16_layer
from megatron.core.transformer.transformer_block import TransformerBlock

from conf.schema import PrecisionConfig
from conf.schema.errors import ConfigError

# Gradients need range more than digits: E5M2, except where each block of 128 has a scale.
FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
# Transformer Engine's default length for DelayedScaling, which Megatron's own (1) undercuts.
AMAX_HISTORY = 1024


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of the decoder's `TransformerConfig`.

    Raises:
        ConfigError: this machine has no FP8, with the reason.
    """
    recipe = precision.fp8_recipe
    if recipe is None:
        return {}
    _require(recipe)
    settings: dict[str, Any] = {"fp8": FORMATS[recipe], "fp8_recipe": recipe}
    if recipe == "delayed":
        settings.update(fp8_amax_history_len=AMAX_HISTORY, fp8_amax_compute_algo="max")
    first, last = precision.fp8_first_layers_bf16, precision.fp8_last_layers_bf16
    if first or last:
        settings.update(
            first_last_layers_bf16=True,
            num_layers_at_start_in_bf16=first,
            num_layers_at_end_in_bf16=last,
        )
    if precision.fp8_params:
        settings["fp8_param"] = True
    return settings


def _require(recipe: str) -> None:
    remedy = "set precision.fp8_recipe=null"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"precision.fp8_recipe={recipe} needs a GPU of compute capability 8.9 or more; {remedy}"
        )
    try:
        import transformer_engine.pytorch as te  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"precision.fp8_recipe={recipe} needs Transformer Engine, which does not import "
            f"({error}); install the [gpu] extra, or {remedy}"
        ) from error
    asked = te.is_fp8_block_scaling_available if recipe == "blockwise" else te.is_fp8_available
    available, reason = asked(return_reason=True)
    if not available:
        raise ConfigError(f"precision.fp8_recipe={recipe} cannot run here: {reason}; {remedy}")


def ddp_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of `DistributedDataParallelConfig` that go with FP8."""
    return {"fp8_param_gather": True} if precision.fp8_params else {}


def in_fp8(decoder: TransformerBlock) -> list[bool]:
    """For each layer of this rank, whether its matrix products are in FP8."""
    config = decoder.config
    return [
        bool(config.fp8) and not is_first_last_bf16_layer(config, layer.layer_number - 1)
        for layer in decoder.layers
    ]


def require_fp8_layers(decoder: TransformerBlock) -> None:
    """Refuse a decoder that would not use the FP8 its configuration asks for.

    Raises:
        ConfigError: a layer is not Transformer Engine's, or Megatron has no FP8 scope for it.
    """
    config = decoder.config
    if not config.fp8:
        return
    try:
        from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base
    except ImportError:
        Base = ()  # nothing is an instance of it

    delayed = config.fp8_recipe == "delayed"  # one scope around all layers
    for layer, wanted in zip(decoder.layers, in_fp8(decoder), strict=True):
        attention, mlp = layer.self_attention, layer.mlp
        linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        scope = get_fp8_context(config, -1 if delayed else layer.layer_number - 1)
        has_scope = not isinstance(scope, nullcontext)
        is_te = all(isinstance(linear, Base) for linear in linears)
        if has_scope != wanted or not is_te:
            kinds = sorted({type(linear).__name__ for linear in linears})
            raise ConfigError(
                f"layer {layer.layer_number} would train in BF16 although precision.fp8_recipe="
                f"{config.fp8_recipe} (its layers are {', '.join(kinds)}); reinstall Transformer "
                "Engine beside Megatron-core (the [gpu] extra), or set precision.fp8_recipe=null"
            )
