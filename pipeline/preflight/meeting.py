"""The ranks meet in rank 0's store, before NCCL: who came, what they found, how clocks go.

Every wait has a limit. Each rank puts its findings into the store; rank 0 collects them, asks each
node for its time, and puts the verdict there, which the others wait for.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.preflight.report import Problem, RankReport, Verdict

CLOCK_SECONDS = 5.0  # most that a node's clock may differ from rank 0's
ANSWER_SECONDS = 20.0  # for something that a rank does at once
PATIENCE_SECONDS = 20.0  # for the others, once a problem is known
_POLL_SECONDS = 0.05
WARNED_ONLY = ("kernel",)  # may differ while nodes are updated one after the other


@dataclass
class Meeting:
    """This rank's connection to the store."""

    store: dist.TCPStore
    report: RankReport

    def publish(self, facts: Mapping[str, Any]) -> None:
        """Put this rank's findings where rank 0 looks for them."""
        own = {
            "node": self.report.node,
            "leads": self.report.leads,
            "problem": self.report.problem,
            "node_fault": self.report.node_fault,
            **facts,
        }
        self.store.set(f"facts/{self.report.rank}", json.dumps(own))

    def answer_clock(self, seconds: float) -> None:
        """Tell rank 0 the time when it asks. Raises Problem when it does not."""
        key = str(self.report.rank)
        try:
            self.store.wait([f"clock/ask/{key}"], timedelta(seconds=seconds))
            self.store.set(f"clock/answer/{key}", repr(time.time()))
        except RuntimeError as error:
            raise Problem(f"rank 0 gave no answer in {seconds:.0f} s ({_line(error)})") from error

    def collect(self, seconds: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Rank 0: findings by rank, and the ranks that did not come in time."""
        waiting = set(range(self.report.world_size))
        found: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + seconds
        hurried = False
        while waiting and time.monotonic() < end:
            for rank in sorted(waiting):
                if self.store.check([f"facts/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"facts/{rank}"))
                    waiting.discard(rank)
            if not hurried and any(facts["problem"] for facts in found.values()):
                hurried, end = True, min(end, time.monotonic() + PATIENCE_SECONDS)
            if waiting:
                time.sleep(_POLL_SECONDS)
        return found, sorted(waiting)

    def skew(self, rank: int, now: Callable[[], float] = time.time) -> tuple[float, float]:
        """Rank 0: (seconds by which the rank's clock is ahead, how far that may be off).

        Cristian's method: the answer was given halfway between question and arrival, give or take
        half of the time between them.
        """
        key, before = str(rank), now()
        started = time.monotonic()
        self.store.set(f"clock/ask/{key}", "")
        self.store.wait([f"clock/answer/{key}"], timedelta(seconds=ANSWER_SECONDS))
        theirs = float(self.store.get(f"clock/answer/{key}"))
        half = (time.monotonic() - started) / 2
        return theirs - (before + half), half

    def announce(self, name: str, verdict: Verdict) -> None:
        """Rank 0: tell the others, and first everybody else: srun ends all ranks with the first."""
        if verdict.problems:
            self.report.conclude(verdict)
        value = [verdict.problems, verdict.nodes, verdict.notes]
        self.store.set(f"verdict/{name}", json.dumps(value))

    def verdict(self, name: str, seconds: float) -> Verdict:
        """Wait for what rank 0 decided. Raises Problem when it says nothing."""
        key = f"verdict/{name}"
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return Verdict(*json.loads(self.store.get(key)))
        except RuntimeError as error:
            raise Problem(f"rank 0 gave no answer in {seconds:.0f} s ({_line(error)})") from error


@contextmanager
def meeting(report: RankReport, seconds: float) -> Iterator[Meeting]:
    """Connect to rank 0's store at MASTER_ADDR:MASTER_PORT; rank 0 leaves last.

    Raises:
        Problem: the address is not set, in use, or does not answer within `seconds`.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise Problem(f"MASTER_ADDR={host} MASTER_PORT={port} is no address; start with srun")
    first = report.rank == 0
    try:
        store = dist.TCPStore(
            host,
            int(port),
            report.world_size,
            is_master=first,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        what = "cannot be opened" if first else f"did not answer in {seconds:.0f} s"
        raise Problem(f"rank 0 at {host}:{port} {what} ({_line(error)})") from error
    try:
        yield Meeting(store, report)
    finally:
        _leave(store, report)


def _leave(store: dist.TCPStore, report: RankReport) -> None:
    """Rank 0 holds the store: it waits a little until the others need it no more."""
    try:
        left = store.add("left", 1)
        end = time.monotonic() + (ANSWER_SECONDS if report.problem is None else 2.0)
        while report.rank == 0 and left < report.world_size and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            left = store.add("left", 0)
    except RuntimeError:
        pass  # rank 0 is gone, and with it the reason to wait


def judge(
    found: Mapping[int, Mapping[str, Any]], missing: Sequence[int], nodes: Mapping[int, str]
) -> Verdict:
    """Rank 0's decision on what the ranks found by themselves.

    Args:
        found: what each rank published, by rank.
        missing: ranks that published nothing.
        nodes: node of each rank as planned, for those that are missing.
    """
    verdict = Verdict()
    every = set(nodes.values()) | {facts["node"] for facts in found.values()}
    absent = {nodes.get(rank, f"the node of rank {rank}") for rank in missing}
    verdict.blame(sorted(absent), "its ranks did not come to the rendezvous")
    bad = {f["node"]: f for f in reversed(list(found.values())) if f["problem"]}
    for node, facts in sorted(bad.items()):
        # What only some nodes find wrong is theirs, what most do is the run's.
        if facts["node_fault"] or (2 * len(bad) <= len(every) and len(every) > 1):
            verdict.blame([node], facts["problem"])
        else:
            verdict.problems.append(f"{node}: {facts['problem']}")
    _compare_gpus(verdict, found)
    leaders = [facts for facts in found.values() if facts["leads"] and not facts["problem"]]
    for kind in ("versions", "data"):
        for name in sorted({name for facts in leaders for name in facts.get(kind, {})}):
            values = {facts["node"]: str(facts[kind].get(name, "none")) for facts in leaders}
            what = f"{name}" if kind == "versions" else f"the manifest of data set {name}"
            _compare(verdict, what, values, warn=name in WARNED_ONLY)
    return verdict


def _compare_gpus(verdict: Verdict, found: Mapping[int, Mapping[str, Any]]) -> None:
    """Ranks of a node must not share a GPU, as they do where all but one have failed."""
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, facts in sorted(found.items()):
        if facts.get("gpu_uuid"):
            owners.setdefault((facts["node"], facts["gpu_uuid"]), []).append(rank)
    for (node, uuid), ranks in owners.items():
        if len(ranks) > 1:
            verdict.blame([node], f"ranks {ranks} share its GPU {uuid}; the others do not show")


def _compare(verdict: Verdict, what: str, values: Mapping[str, str], warn: bool) -> None:
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    (usual, count), *_ = counts.most_common()
    if warn:
        verdict.notes.append(f"{what} differs between nodes: {', '.join(sorted(counts))}")
    elif 2 * count > len(values):
        for node in sorted(node for node, value in values.items() if value != usual):
            verdict.blame([node], f"{what} is {values[node][:40]}, elsewhere {usual[:40]}")
    else:
        listed = ", ".join(f"{value[:40]} on {node}" for node, value in sorted(values.items()))
        verdict.problems.append(f"{what} differs between nodes: {listed[:400]}")


def judge_clocks(verdict: Verdict, skews: Mapping[str, tuple[float, float]]) -> None:
    """Blame nodes whose clock is off, or all but rank 0's agree that rank 0's is."""
    off = {n: skew for n, (skew, half) in skews.items() if abs(skew) - half > CLOCK_SECONDS}
    for node, skew in sorted(off.items()):
        verdict.problems.append(f"{node}: its clock is {skew:+.1f} s off rank 0's")
    if off and 2 * len(off) <= len(skews):
        # A few are wrong; if most are, it may be rank 0's own clock.
        verdict.nodes |= {node: f"its clock is {skew:+.1f} s off" for node, skew in off.items()}


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
