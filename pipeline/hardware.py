"""What this node can do, for the checks of a configuration."""

import importlib.util

import torch

from conf.hardware import Hardware


def detect() -> Hardware:
    """GPUs, compute capability and Transformer Engine of this machine."""
    cuda = torch.cuda.is_available()
    return Hardware(
        cuda=cuda,
        capability=torch.cuda.get_device_capability() if cuda else None,
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )
