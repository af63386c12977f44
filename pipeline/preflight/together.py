"""The phases of preflight that need the other ranks: rendezvous, agreement, collectives."""

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from conf.node_list import expand
from conf.schema import Config
from pipeline.preflight import bandwidth as net
from pipeline.preflight.meeting import Meeting, judge, judge_clocks, meeting
from pipeline.preflight.report import PASSED, Problem, RankReport, Verdict

_SHARED = ("versions", "data", "gpu_uuid")  # what rank 0 compares


def together(config: Config, report: RankReport, seconds: float) -> int:
    """Meet within `seconds`, compare, and use the network; the exit code.

    Raises:
        Problem: rank 0 cannot be heard.
    """
    started = time.monotonic()
    with meeting(report, seconds) as ranks:
        ranks.publish({kind: report.numbers[kind] for kind in _SHARED if kind in report.numbers})
        if report.rank == 0:
            facts, verdict = _judge(ranks, seconds)
            ranks.announce("facts", verdict)
            nodes = {f["node"]: rank for rank, f in sorted(facts.items(), reverse=True)}
        else:
            if report.leads and report.problem is None:
                ranks.answer_clock(seconds)
            verdict, nodes = ranks.verdict("facts", seconds), {}
        if verdict.problems or report.problem is not None:
            return 1  # rank 0 has told
        report.passed("rendezvous")
        speed = 0.0
        if report.world_size > 1:
            verdict, speed = _collectives(config, ranks, nodes, verdict)
            if verdict.problems:
                return 1
        report.passed(PASSED, {"bus_gb_per_s": round(speed, 3)})
    if report.rank == 0:
        took = time.monotonic() - started
        notes = "".join(f"; {note}" for note in verdict.notes)
        print(
            f"preflight passed: {len(nodes)} nodes, {report.world_size} ranks, all-reduce "
            f"{speed:.2f} GB/s, {report.numbers['disk_free_gb']:.1f} GB free ("
            f"{report.numbers['disk_need_gb']:.1f} needed), {took:.1f} s together{notes}",
            flush=True,
        )
    return 0


def planned_nodes(environment: Mapping[str, str]) -> dict[int, str]:
    """Rank -> node as Slurm lays out a step in blocks; empty elsewhere."""
    try:
        names = expand(environment["SLURM_STEP_NODELIST"])
        counts: list[int] = []
        for word in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
            match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
            if match is None:
                return {}
            counts += [int(match[1])] * int(match[2] or 1)
    except (KeyError, ValueError):
        return {}
    ranks = (name for name, count in zip(names, counts, strict=False) for _ in range(count))
    return dict(enumerate(ranks))


def _judge(ranks: Meeting, seconds: float) -> tuple[dict[int, dict[str, Any]], Verdict]:
    facts, missing = ranks.collect(seconds)
    verdict = judge(facts, missing, planned_nodes(os.environ))
    skews = {}
    for rank, found in sorted(facts.items()):
        if rank and found["leads"] and not found["problem"]:
            try:
                skews[found["node"]] = ranks.skew(rank)
            except RuntimeError:
                verdict.blame([found["node"]], "it stopped answering")
    judge_clocks(verdict, skews)
    return facts, verdict


def _collectives(
    config: Config, ranks: Meeting, nodes: Mapping[str, int], verdict: Verdict
) -> tuple[Verdict, float]:
    """All-reduces of all ranks, then of neighbours where those fail or are slow.

    Args:
        nodes: node -> the first of its ranks; on rank 0 only.

    Returns rank 0's verdict, and the bus bandwidth in GB/s.
    """
    report, store = ranks.report, ranks.store
    speed, failure = _world(ranks)
    store.set(f"world/{report.rank}", json.dumps([speed, failure]))
    if report.rank == 0:
        problem = _world_problem(ranks, config.cluster.site.min_bandwidth, len(nodes))
        plan = sorted(nodes.items(), key=lambda item: item[1]) if problem else []
        store.set("ring", json.dumps([problem, plan]))
    wait = 2 * net.COLLECTIVE_SECONDS
    try:
        store.wait(["ring"], timedelta(seconds=wait))
        problem, plan = json.loads(store.get("ring"))
    except RuntimeError as error:
        raise Problem(f"rank 0 was lost after the collectives ({_first(error)})") from error
    if not problem:
        report.passed("collectives")
        return verdict, speed
    places = {rank: place for place, (_, rank) in enumerate(plan)}
    if report.rank in places and len(plan) > 1:
        links = net.measure_links(store, places[report.rank], len(plan))
        store.set(f"links/{report.rank}", json.dumps([[*pair, gb] for pair, gb in links.items()]))
    if report.rank == 0:
        found = _name_the_slow(ranks, problem, plan)
        ranks.announce("links", found)
        return found, speed
    return ranks.verdict("links", 4 * net.PAIR_SECONDS), speed


def _world(ranks: Meeting) -> tuple[float, str]:
    """Bus bandwidth of all ranks together and how it failed, if it did."""
    report = ranks.report
    try:
        device = net.join(
            ranks.store, "world", report.rank, report.world_size, net.COLLECTIVE_SECONDS
        )
        return net.all_reduce(device), ""
    except (RuntimeError, Problem) as error:
        return 0.0, _first(error)
    finally:
        with suppress(RuntimeError):
            net.leave()


def _world_problem(ranks: Meeting, least: float, nodes: int) -> str:
    """Rank 0: what is wrong with the collectives of all ranks; empty if nothing."""
    failures, speeds = [], []
    for rank in range(ranks.report.world_size):
        try:
            ranks.store.wait([f"world/{rank}"], timedelta(seconds=net.COLLECTIVE_SECONDS))
            speed, failure = json.loads(ranks.store.get(f"world/{rank}"))
        except RuntimeError:
            speed, failure = 0.0, f"rank {rank} stopped answering"
        speeds.append(speed)
        failures += [failure] if failure else []
    if failures:
        return f"an all-reduce over all ranks failed ({failures[0]})"
    if nodes > 1 and min(speeds) < least:
        return (
            f"an all-reduce over all ranks reached {min(speeds):.2f} GB/s, "
            f"cluster.site.min_bandwidth={least:g}"
        )
    return ""


def _name_the_slow(ranks: Meeting, problem: str, plan: list[tuple[str, int]]) -> Verdict:
    links: dict[tuple[int, int], float] = {}
    for _, rank in plan if len(plan) > 1 else []:
        with suppress(RuntimeError):
            ranks.store.wait([f"links/{rank}"], timedelta(seconds=3 * net.PAIR_SECONDS))
            for a, b, speed in json.loads(ranks.store.get(f"links/{rank}")):
                links[a, b] = min(speed, links.get((a, b), speed))
    names = [node for node, _ in plan]
    listed = f"; neighbours: {net.describe(links, names)} GB/s" if links else ""
    verdict = Verdict(problems=[problem + listed])
    slow = [names[place] for place in net.slow_places(links, len(plan))]
    verdict.blame(slow, "slow or broken links to its neighbours")
    return verdict


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
