"""Two or more sides measured in turn, each in a process of its own.

Processes, because one side must not see what another does to torch (Megatron on a CPU redirects
every call of it); in turn, so that a slow minute of the machine falls on all sides alike. A side
that has no turn sleeps.
"""

import multiprocessing
import os
import resource
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tools.benchmarks.machine import OtherWork

# Called once in its process; what it returns is called once per turn and says how long it took
# ("seconds") and what it did in that time (counts).
Setup = Callable[..., Callable[[], dict[str, float]]]
START_SECONDS = 300.0


class SideError(ValueError):
    """A side that cannot be measured; the message names it and carries its last error."""


@dataclass(frozen=True)
class Side:
    """One of the things compared: `setup(**arguments)` runs in the side's own process."""

    name: str
    setup: Setup
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Turns:
    """What each side reported, one entry per turn; turn i of all sides belongs together."""

    reports: dict[str, list[dict[str, float]]]
    others: float | None  # median over the turns of the share of the processors that others took

    def rates(self, side: str, count: str, clock: str = "seconds") -> list[float]:
        """`count` per second in each turn."""
        return [report[count] / report[clock] for report in self.reports[side]]

    def median(self, side: str, count: str) -> float:
        """Median of `rates`."""
        return statistics.median(self.rates(side, count))

    def value(self, side: str, name: str) -> float:
        """Median of a reported number over the turns."""
        return statistics.median(report[name] for report in self.reports[side])

    def ratios(self, side: str, reference: str, count: str, clock: str = "seconds") -> list[float]:
        """Rate of `side` over that of `reference`, turn by turn.

        `clock`: "cpu_seconds" compares processor time, which other work on the machine disturbs
        less (its caches and clock are still shared).
        """
        pairs = zip(
            self.rates(side, count, clock), self.rates(reference, count, clock), strict=True
        )
        return [mine / theirs for mine, theirs in pairs]


def spread(ratios: Sequence[float]) -> str:
    """Median of the turns' ratios, and the smallest and largest of them."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _worker(connection: Connection, setup: Setup, arguments: Mapping[str, Any]) -> None:
    try:
        turn = setup(**arguments)
        connection.send(("ready", _cpu_seconds()))
        while connection.recv() == "turn":
            before = _cpu_seconds()
            report = turn()
            report["cpu_seconds"] = _cpu_seconds() - before
            report["cpu_seconds_so_far"] = _cpu_seconds()
            report["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            connection.send(("report", report))
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException:
        connection.send(("error", traceback.format_exc(limit=-3)))
    finally:
        connection.close()
        sys.stdout.flush()
        os._exit(0)  # without the destructors of process groups that nobody waits for


@dataclass
class _Worker:
    side: Side
    process: Any
    connection: Connection

    def answer(self, seconds: float) -> Any:
        """Raises SideError when there is none in time, or it is an error."""
        try:
            if not self.connection.poll(seconds):
                raise SideError(f"{self.side.name} did not answer within {seconds:.0f} s")
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            raise SideError(
                f"{self.side.name} ended with status {self.process.exitcode}; out of memory?"
            ) from None
        if kind == "error":
            raise SideError(f"{self.side.name}: {value.strip()}")
        return value


def take_turns(
    sides: Sequence[Side],
    turns: int,
    warm_up: int = 1,
    turn_seconds: float = 600.0,
    say: Callable[[str], None] = lambda message: None,
) -> Turns:
    """Run `warm_up` and then `turns` rounds; in each, every side once, in the order given.

    Raises:
        SideError: a side failed, died, or took longer than `turn_seconds`.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for side in sides:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker, args=(theirs, side.setup, dict(side.arguments)), daemon=True
            )
            process.start()
            theirs.close()
            workers.append(_Worker(side, process, ours))
        used = {worker.side.name: worker.answer(START_SECONDS) for worker in workers}
        reports: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
        work = OtherWork()
        unknown = False
        for number in range(warm_up + turns):
            for worker in workers:
                work.start(sum(used.values()))
                worker.connection.send("turn")
                report = worker.answer(turn_seconds)
                used[worker.side.name] = report.pop("cpu_seconds_so_far")
                if number >= warm_up:
                    unknown |= work.stop(sum(used.values())) is None
                    reports[worker.side.name].append(report)
            say(f"round {number + 1} of {warm_up + turns}")
        known = work.shares and not unknown
        return Turns(reports, statistics.median(work.shares) if known else None)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join(5)
