"""What every part is given."""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from conf.schema import PrecisionConfig
from tools.benchmarks.gpu.shapes import Shapes, precisions


@dataclass(frozen=True)
class Context:
    """Device, sizes, and how long this part may still take."""

    device: torch.device
    shapes: Shapes
    out: Path
    batches: Path  # the demo's packed batches; may be absent
    deadline: float  # of time.monotonic

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precisions(self) -> dict[str, PrecisionConfig]:
        return precisions(self.cuda)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes of the GPU's tensors; 0 on a CPU, which does not count them."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def free(self) -> None:
        """Give back what a finished item held; its own references must be gone."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def local_layers() -> Iterator[None]:
    """Build Megatron's local layers although there is a GPU with Transformer Engine."""
    from models import layer_specs

    with mock.patch.object(layer_specs, "uses_transformer_engine", lambda: False):
        yield


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))
