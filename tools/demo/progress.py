"""Progress lines of the demo's pre-training: step, loss, learning rate, seconds left."""

import math
import time


class Progress:
    """Prints a line every `every` steps and at the end; measures wall seconds from its making."""

    def __init__(self, name: str, steps: int, every: int) -> None:
        self.name, self.steps, self.every = name, steps, every
        self._start = time.monotonic()
        self._sum, self._count = 0.0, 0

    def update(self, step: int, loss: float, note: str = "") -> None:
        """After step `step` (from 1); `loss` is averaged over the steps since the last line."""
        self._sum += loss
        self._count += 1
        if step % self.every and step != self.steps:
            return
        elapsed = time.monotonic() - self._start
        left = elapsed / step * (self.steps - step)
        line = f"{self.name} step {step}/{self.steps} loss {self._sum / self._count:.4f}"
        print(f"{line} {note}{elapsed:.0f} s, {left:.0f} s left", flush=True)
        self._sum, self._count = 0.0, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor of the peak learning rate at `step` (from 0): linear warmup, cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
