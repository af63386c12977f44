"""Where the time of a step goes, by the timers that Megatron calls by itself.

Megatron's schedules, gradient reductions and optimizers call `config.timers(name).start()` and
`.stop()` wherever they compute or communicate. Its own `Timers` wait for the GPU at each of them,
and for all ranks at some, which changes what is measured; these do neither. On a GPU a start or a
stop records a CUDA event on the current stream, and the events are read at the end of the step,
which the loop waits for anyway; on a CPU it reads a clock.

Each moment counts once, for the innermost timer that runs then and belongs to a kind: an
all-gather inside the optimizer is communication. What no timer covers is "other", so the kinds of
a step add up to its seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

Item = TypeVar("Item")
FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
COMMUNICATION, CHECKPOINT, DATA, OTHER = "communication", "checkpoint", "data", "other"
KINDS = (DATA, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, CHECKPOINT, OTHER)

# Megatron-core 0.16.1 and 0.19.2 (the same names): pipeline_parallel/schedules.py,
# p2p_communication.py, distributed/finalize_model_grads.py, optimizer/*.py. Names that are not
# here count as what is around them: "forward-backward", and the optimizer's parts.
_MEGATRON = {
    "forward-compute": FORWARD,
    "backward-compute": BACKWARD,
    **dict.fromkeys(
        (
            "forward-recv", "forward-send", "backward-recv", "backward-send",
            "forward-send-backward-recv", "backward-send-forward-recv",
            "forward-send-forward-recv", "backward-send-backward-recv",
            "forward-backward-send-forward-backward-recv",
            "all-grads-sync", "conditional-embedder-grads-all-reduce",
            "non-tensor-parallel-grads-all-reduce", "embedding-grads-all-reduce",
            "params-all-gather",
        ),
        COMMUNICATION,
    ),
}  # fmt: skip
KIND_OF = {**_MEGATRON, **{kind: kind for kind in KINDS}}


class Clock(Protocol):
    """Marks moments now, tells the time between them later."""

    def mark(self) -> Any:
        """A moment: this one, or when the GPU gets here."""

    def wait(self, mark: Any) -> None:
        """Until the moment has come."""

    def seconds(self, first: Any, last: Any) -> float:
        """Between two moments that have come."""

    def forget(self, marks: Iterable[Any]) -> None:
        """They will not be asked for again."""


class HostClock:
    """The CPU's: a moment is its number of seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def forget(self, marks: Iterable[float]) -> None:
        pass


class CudaClock:
    """The current stream's: a moment is an event, used again once it was read."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return first.elapsed_time(last) / 1e3

    def forget(self, marks: Iterable[torch.cuda.Event]) -> None:
        self._free.extend(marks)


class NamedTimer:
    """What `timers(name)` returns: Megatron's start and stop, or a `with` block."""

    def __init__(self, timers: StepTimers, name: str) -> None:
        self._timers, self.name = timers, name

    def start(self, barrier: bool = False) -> None:
        """Begin. No barrier: waiting for other ranks is part of what is measured."""
        self._timers.enter(self.name)

    def stop(self, barrier: bool = False) -> None:
        """End the innermost of this name; without one, nothing: timing ends no run."""
        self._timers.leave(self.name)

    def __enter__(self) -> NamedTimer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class StepTimers:
    """The timers of one rank. They count between `begin` and `end`, and nothing before."""

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock` is the current GPU's where there is one, else the CPU's."""
        self._clock: Clock = clock or (CudaClock() if torch.cuda.is_available() else HostClock())
        self._timers: dict[str, NamedTimer] = {}
        self._running: list[tuple[str, str, Any]] = []  # (name, kind, annotation), innermost last
        self._marks: list[tuple[str, Any]] = []  # (kind from then on, moment)
        self._counts = False
        self.annotates = False  # name the timers in the trace of torch's profiler

    def __call__(self, name: str, log_level: int | None = None) -> NamedTimer:
        """Megatron's protocol; every level is timed."""
        if name not in self._timers:
            self._timers[name] = NamedTimer(self, name)
        return self._timers[name]

    @property
    def running(self) -> str:
        """Name of the innermost timer that runs, "" where none does; other threads may ask."""
        innermost = self._running[-1:]
        return innermost[0][0] if innermost else ""

    def attach(self, models: Sequence[torch.nn.Module], optimizer: Any) -> None:
        """Let Megatron's schedules and optimizers call these timers.

        Args:
            models: this rank's chunks of the network, wrapped or not.
            optimizer: a MegatronOptimizer; one without parameters on this rank has no config.
        """
        from megatron.core.utils import get_model_config

        configs = [get_model_config(model) for model in models]
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            configs.append(getattr(part, "config", None))
        for config in configs:
            if config is not None:
                config.timers = self

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; waiting for each is timed under `name`."""
        iterator = iter(items)
        while True:
            with self(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def begin(self) -> None:
        """Count from now on."""
        self._counts = True
        self._clock.forget(mark for _, mark in self._marks)
        self._running, self._marks = [], [(OTHER, self._clock.mark())]

    def enter(self, name: str) -> None:
        """A timer starts."""
        if not self._counts:
            return
        kind = KIND_OF.get(name) or self._kind()
        annotation = None
        if self.annotates:
            annotation = torch.profiler.record_function(name)
            annotation.__enter__()
        self._running.append((name, kind, annotation))
        self._mark()

    def leave(self, name: str) -> None:
        """A timer stops."""
        for place in reversed(range(len(self._running))):
            if self._running[place][0] == name:
                annotation = self._running.pop(place)[2]
                if annotation is not None:
                    annotation.__exit__(None, None, None)
                self._mark()
                return

    def end(self) -> dict[str, float]:
        """Seconds of each kind since `begin` or the last `end`; a timer that runs goes on.

        Waits until the GPU has come here.
        """
        if not self._counts:
            return {}
        last = self._clock.mark()
        self._clock.wait(last)
        marks = [*self._marks, (self._kind(), last)]
        seconds = dict.fromkeys(KINDS, 0.0)
        for (kind, first), (_, second) in zip(marks, marks[1:], strict=False):
            seconds[kind] += self._clock.seconds(first, second)
        self._clock.forget(mark for _, mark in self._marks)
        self._marks = marks[-1:]
        return seconds

    def _kind(self) -> str:
        return self._running[-1][1] if self._running else OTHER

    def _mark(self) -> None:
        if self._kind() != self._marks[-1][0]:
            self._marks.append((self._kind(), self._clock.mark()))
