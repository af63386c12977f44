"""How much memory this process has needed."""

import resource
import sys

import torch


def peak_bytes() -> int:
    """Most bytes held so far: tensors on this rank's GPU, or without one the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
