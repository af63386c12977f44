"""Each moment counts once, and Megatron's own calls are understood."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import timers as module
from pipeline.timers import KIND_OF, KINDS, CudaClock, StepTimers


class FakeClock:
    """Time passes when told; counts the marks that are alive."""

    def __init__(self) -> None:
        self.now = 0.0
        self.marks = 0
        self.waits = 0

    def mark(self) -> float:
        self.marks += 1
        return self.now

    def wait(self, mark: float) -> None:
        self.waits += 1

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def forget(self, marks: Any) -> None:
        self.marks -= len(list(marks))


def nonzero(seconds: dict[str, float]) -> dict[str, float]:
    assert list(seconds) == list(KINDS)
    return {kind: value for kind, value in seconds.items() if value}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def timers(clock: FakeClock) -> StepTimers:
    timers = StepTimers(clock)
    timers.begin()
    return timers


def test_the_innermost_kind_counts(timers: StepTimers, clock: FakeClock) -> None:
    timers("forward-backward", log_level=1).start(barrier=True)
    clock.now += 1  # other: the schedule itself
    timers("forward-compute", log_level=2).start()
    clock.now += 2
    timers("forward-compute").stop()
    timers("all-grads-sync").start()
    clock.now += 4
    timers("all-grads-sync").stop()
    timers("forward-backward").stop()
    with timers("optimizer"):
        clock.now += 8
        with timers("optimizer-inner-step"):
            clock.now += 16
        with timers("params-all-gather"):
            clock.now += 32
        clock.now += 64
    clock.now += 128
    seconds = timers.end()
    assert nonzero(seconds) == {
        "forward": 2,
        "communication": 4 + 32,
        "optimizer": 8 + 16 + 64,
        "other": 1 + 128,
    }
    assert sum(seconds.values()) == clock.now


def test_a_timer_may_start_again_inside_itself(timers: StepTimers, clock: FakeClock) -> None:
    with timers("backward-compute"):
        clock.now += 1
        with timers("backward-compute"):
            clock.now += 2
        clock.now += 4
    clock.now += 8
    assert nonzero(timers.end()) == {"backward": 7, "other": 8}


def test_timers_may_cross(timers: StepTimers, clock: FakeClock) -> None:
    timers("forward-compute").start()
    timers("forward-recv").start()
    clock.now += 1
    timers("forward-compute").stop()
    clock.now += 2
    timers("forward-recv").stop()
    clock.now += 4
    assert nonzero(timers.end()) == {"communication": 3, "other": 4}


def test_a_stop_without_a_start_is_ignored(timers: StepTimers, clock: FakeClock) -> None:
    timers("forward-compute").stop()
    with timers("backward-compute"):
        timers("forward-compute").stop()
        clock.now += 1
    assert nonzero(timers.end()) == {"backward": 1}


def test_an_exception_ends_the_block(timers: StepTimers, clock: FakeClock) -> None:
    with pytest.raises(KeyError), timers("checkpoint"):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert nonzero(timers.end()) == {"checkpoint": 1, "other": 2}


def test_steps_follow_each_other_without_a_gap(timers: StepTimers, clock: FakeClock) -> None:
    with timers("data"):
        clock.now += 1
        assert nonzero(timers.end()) == {"data": 1}
        clock.now += 2
    clock.now += 4
    assert nonzero(timers.end()) == {"data": 2, "other": 4}
    assert clock.waits == 2, "once a step, not once a timer"
    assert clock.marks == 1, "the moment at which the next step begins"


def test_waiting_for_items_is_timed(timers: StepTimers, clock: FakeClock) -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            for number in range(3):
                clock.now += 1
                yield number
        finally:
            closed.append(True)

    for number in timers.each("data", items()):
        clock.now += 10
        if number == 1:
            break
    assert nonzero(timers.end()) == {"data": 2, "other": 20}
    assert closed, "the loader's threads end with the loop"
    assert list(timers.each("data", items())) == [0, 1, 2]


def test_nothing_is_kept_before_the_first_step(clock: FakeClock) -> None:
    timers = StepTimers(clock)
    with timers("forward-compute"):
        clock.now += 1
    assert timers.end() == {} and clock.marks == 0
    with timers("forward-compute"):  # runs while the counting begins
        timers.begin()
        clock.now += 2
    assert nonzero(timers.end()) == {"other": 2}


def test_cuda_events_are_recorded_once_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what would be asked of it."""
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.calls: list[str] = []
            made.append(self)

        def record(self) -> None:
            self.calls.append("record")

        def synchronize(self) -> None:
            self.calls.append("synchronize")

        def elapsed_time(self, other: Any) -> float:
            assert self.calls and other.calls
            return 250.0  # milliseconds

    monkeypatch.setattr(module.torch.cuda, "Event", Event)
    timers = StepTimers(CudaClock())
    timers.begin()
    for _ in range(3):
        for _ in range(4):
            with timers("forward-compute"):
                pass
        assert timers.end()["forward"] == 4 * 0.25
    waits = sum(event.calls.count("synchronize") for event in made)
    assert waits == 3, "once a step"
    assert len(made) <= 2 * (2 * 4 + 1)


@pytest.mark.gpu
def test_on_a_gpu_the_stream_is_timed_not_the_host() -> None:
    import torch

    weights = torch.randn(4096, 4096, device="cuda")
    timers = StepTimers()
    timers.begin()
    began = time.perf_counter()
    with timers("forward-compute"):
        for _ in range(50):
            weights @ weights
    queued = time.perf_counter() - began
    seconds = timers.end()
    whole = time.perf_counter() - began
    assert queued < seconds["forward"] <= whole * 1.05
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.2)


def test_configs_of_models_and_optimizers_are_found(timers: StepTimers) -> None:
    configs = [SimpleNamespace(timers=None) for _ in range(3)]
    models: Any = [SimpleNamespace(config=configs[0])]
    parts = [SimpleNamespace(config=configs[1]), SimpleNamespace()]
    timers.attach(models, SimpleNamespace(chained_optimizers=parts))
    timers.attach(models, SimpleNamespace(config=configs[2]))
    assert all(config.timers is timers for config in configs)


def test_every_name_that_megatron_uses_has_a_kind_or_a_reason() -> None:
    """A new release of Megatron with other names shows here."""
    import megatron.core

    package = Path(next(iter(megatron.core.__path__)))
    names = {
        name
        for file in package.rglob("*.py")
        for name in re.findall(r"timers\(\s*'([a-z-]+)'", file.read_text(encoding="utf-8"))
    }
    assert {"forward-compute", "all-grads-sync", "params-all-gather"} <= names
    around = {name for name in names - set(KIND_OF) if not name.startswith("optimizer-")}
    assert around == {"forward-backward"}
