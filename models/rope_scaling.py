"""RoPE frequencies stretched as transformers stretches them (modeling_rope_utils.py, 4.57.6).

Megatron-core has Llama 3's rule with fixed bounds; checkpoints state theirs.
"""

import math

import torch
from torch import Tensor

from conf.schema.model import RopeScaling


def scaled_frequencies(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Inverse frequencies [head_dim / 2] -> the same, stretched, in their dtype.

    `linear` divides all by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_positions / low_freq_factor`, leaves those below `original_max_positions /
    high_freq_factor`, and passes smoothly from one to the other between.
    """
    if scaling.kind == "none":
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    length, low, high = (
        scaling.original_max_positions,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > length / low, inv_freq / scaling.factor, inv_freq)
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    is_between = ~(wavelength < length / high) & ~(wavelength > length / low)
    return torch.where(is_between, between, stretched)
