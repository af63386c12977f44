"""Whole tensors <-> shards, by hand, so that checkpoint code is not tested by itself."""

import re

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from models.llava_next import LlavaNext


def global_name(model: LlavaNext, name: str) -> str:
    """Parameter name with the decoder layer counted over all pipeline stages."""
    match = re.fullmatch(r"(language_model\.decoder\.layers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    number = model.language_model.decoder.layers[int(match[2])].layer_number - 1
    return f"{match[1]}{number}{match[3]}"


def _is_gated(name: str) -> bool:
    return name.startswith("language_model.") and "mlp.linear_fc1" in name


def load_shards(model: LlavaNext, whole: dict[str, Tensor]) -> None:
    """Copy this rank's part of every tensor into the model."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = whole[global_name(model, name)]
            if getattr(parameter, "tensor_model_parallel", False) and size > 1:
                axis = parameter.partition_dim
                parts = tensor.chunk(2) if _is_gated(name) else [tensor]
                tensor = torch.cat([part.chunk(size, axis)[rank] for part in parts], axis)
            parameter.copy_(tensor)


def gather_shards(model: LlavaNext, attribute: str) -> dict[str, Tensor]:
    """Whole tensors of this pipeline stage, `attribute` being data, grad or main_grad.

    Parameters that have none (frozen ones lie outside DDP) are left out.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for name, parameter in model.named_parameters():
        tensor = getattr(parameter, attribute, None)
        if tensor is None:
            continue
        tensor = tensor.detach().float().contiguous().clone()
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            parts = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(parts, tensor, group=group)
            axis = parameter.partition_dim
            if _is_gated(name):
                halves = [part.chunk(2) for part in parts]
                parts = [half[0] for half in halves] + [half[1] for half in halves]
            tensor = torch.cat(parts, axis)
        whole[global_name(model, name)] = tensor
    return whole
