"""SigLIP's vision encoder on Megatron's TransformerBlock.

Source: `SiglipVisionTransformer` of transformers 4.57.6 (modeling_siglip.py) and the pixel
arithmetic of its slow image processor (image_transforms.py, `rescale` and `normalize`).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from conf.schema import VisionConfig
from models.layer_specs import LayerNorm, block_spec, layer_spec


def pixel_table() -> Tensor:
    """Normalised value of each of the 256 pixel values, float32 [256], bit for bit HF's.

    HF multiplies by 1/255 in float64, rounds to float32, then computes (x - 0.5) / 0.5 there.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((scaled - np.float32(0.5)) / np.float32(0.5))


class VisionTower(MegatronModule):
    """Tiles to patch features, `hidden_states[feature_layer]` of HF's encoder.

    The layers past `feature_layer` and `post_layernorm` never run and never train; they are
    carried so that checkpoints and exports are complete models. Shapes: N tiles, g patches along
    a tile's side, H hidden size.
    """

    def __init__(self, config: TransformerConfig, vision: VisionConfig) -> None:
        super().__init__(config=config)
        self.grid = vision.grid
        hidden, dtype = vision.hidden_size, config.params_dtype
        device = torch.cuda.current_device()
        self.patch_embedding = nn.Conv2d(
            3, hidden, vision.patch_size, vision.patch_size, dtype=dtype, device=device
        )
        self.position_embedding = nn.Parameter(
            torch.randn(vision.grid**2, hidden).to(device=device, dtype=dtype) * hidden**-0.5
        )
        self.encoder = TransformerBlock(
            config=config,
            spec=block_spec(config, vision.layers_used, causal=False),
            post_layer_norm=False,  # HF takes hidden states before it
        )
        self.unused_layers = nn.ModuleList(
            build_module(layer_spec(config, causal=False), config=config, layer_number=number + 1)
            for number in range(vision.layers - vision.layers_used)
        )
        self.post_layernorm = LayerNorm(config, hidden, vision.layer_norm_eps).to(device)
        self.unused_layers.requires_grad_(False)
        self.post_layernorm.requires_grad_(False)
        self.pixel_table: Tensor
        self.register_buffer("pixel_table", pixel_table().to(device), persistent=False)

    def used_parameters(self) -> list[nn.Parameter]:
        """Parameters that `forward` reads."""
        return [
            *self.patch_embedding.parameters(),
            self.position_embedding,
            *self.encoder.parameters(),
        ]

    def forward(self, tiles_NCHW: Tensor) -> Tensor:
        """uint8 [N, 3, side, side] -> [g*g, N, H] in the parameters' dtype."""
        # the table is rounded, not the pixels: no float32 copy of them
        values = self.pixel_table.to(self.patch_embedding.weight.dtype)[:, None]
        pixels_NCHW = F.embedding(tiles_NCHW.int(), values).squeeze(-1)
        patches_NHgg = self.patch_embedding(pixels_NCHW)
        hidden_PNH = patches_NHgg.flatten(2).permute(2, 0, 1) + self.position_embedding[:, None]
        return self.encoder(hidden_PNH.contiguous(), attention_mask=None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Everything, the never-run layers included.

        Megatron would save a plain `ModuleList` as if each tensor-parallel rank held a copy of
        the same tensors, hence the unused layers are asked one by one.
        """
        modules = dict(self._modules)
        del self._modules["unused_layers"]
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:  # in their old order
            self._modules.clear()
            self._modules.update(modules)
        for number, layer in enumerate(self.unused_layers):
            assert isinstance(layer, MegatronModule)
            layer_prefix = f"{prefix}unused_layers.{number}."
            state.update(layer.sharded_state_dict(layer_prefix, sharded_offsets, metadata))
        return state
