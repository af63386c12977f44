"""Which layer implementations the transformer blocks are made of.

Transformer Engine where CUDA is available, Megatron's local layers where it is not: decided by
the hardware, never by what happens to be installed (Transformer Engine imports without a GPU but
cannot build a layer there). Both write the same checkpoint keys: the local layers' norms are saved
under the names of Transformer Engine's fused ones (`sharded_state_dict_keys_map`).

Rows are packed (`thd`) in the decoder only, where Megatron's `TEDotProductAttention` turns the
mask `causal` into `padding_causal`, the one that Transformer Engine's packed attention takes. The
vision encoder's tiles are equally long: it stays in `sbhd` without a mask, as Transformer Engine
warns of packed backward passes for head sizes, like SigLIP's 72, that 16 does not divide.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from models.packed_attention import PackedAttention


def _mark(parameter: torch.Tensor, config: TransformerConfig) -> None:
    """Have `finalize_model_grads` add up this parameter's gradient over tensor-parallel ranks."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; unlike Megatron's `WrappedTorchNorm` it allows sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self.weight, config)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm; unlike Megatron's `WrappedTorchNorm` it allows sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self.weight, config)
        _mark(self.bias, config)


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's.

    Raises:
        ValueError: there is a GPU, but Transformer Engine cannot be imported.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"this machine has a GPU but Transformer Engine does not import ({error}); "
            "install the [gpu] extra, or hide the GPU with CUDA_VISIBLE_DEVICES="
        ) from error
    return True


def norm_class(config: TransformerConfig) -> type:
    """Stand-alone norm of the block's kind (`config.normalization`)."""
    if uses_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        norm: type = TENorm
        return norm
    return RMSNorm if config.normalization == "RMSNorm" else LayerNorm


def layer_spec(config: TransformerConfig, causal: bool) -> ModuleSpec:
    """One transformer layer: the decoder's (causal) or the vision encoder's (no mask)."""
    if uses_transformer_engine():
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
        norm = norm_class(config)
        spec.submodules.input_layernorm = norm
        spec.submodules.pre_mlp_layernorm = norm
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    spec.submodules.self_attention.params = {"attn_mask_type": mask_type}
    return spec


def block_spec(config: TransformerConfig, layers: int, causal: bool) -> TransformerBlockSubmodules:
    """A stack of `layers` equal layers and the norm after them."""
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, causal)] * layers, layer_norm=norm_class(config)
    )


def fuse_gradient_accumulation(decoder: TransformerBlock) -> None:
    """Have the layers' weight gradients added to DDP's `main_grad` by their matrix products.

    Transformer Engine can; `TransformerConfig.gradient_accumulation_fusion` would also ask it of
    the output layer, Megatron's own, which needs Apex for it. Call it on a decoder inside
    `DistributedDataParallel`, which owns `main_grad`. Not for a module that runs twice in a
    micro-batch (the vision tower may): the first micro-batch overwrites instead of adding. Local
    layers are left alone.
    """
    for module in decoder.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
