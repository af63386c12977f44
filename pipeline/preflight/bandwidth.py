"""Collectives: right sums, at a sane speed; and which node is slow where they are not.

Bus bandwidth as nccl-tests define it: bytes / seconds * 2 * (ranks - 1) / ranks of an all-reduce,
comparable between numbers of ranks.
"""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.preflight.report import Problem

COLLECTIVE_SECONDS = 120.0
PAIR_SECONDS = 30.0
GPU_BYTES = (1 << 20, 1 << 24, 1 << 28)
CPU_BYTES = (1 << 16, 1 << 20)
_WARM_UP, _ROUNDS = 2, 5
_SLOW = 0.5  # of the fastest link


def join(store: dist.Store, prefix: str, rank: int, ranks: int, seconds: float) -> torch.device:
    """Make the default process group of `ranks` ranks; returns its device."""
    cuda = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def leave() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(device: torch.device) -> float:
    """Check sums and return the best bus bandwidth, GB/s; 0 for a single rank.

    Raises:
        Problem: a sum is wrong.
        RuntimeError: the backend failed or ran out of time.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    best = 0.0
    for size in GPU_BYTES if device.type == "cuda" else CPU_BYTES:
        tensor = torch.full((size // 4,), float(rank + 1), device=device)
        dist.all_reduce(tensor)
        total = ranks * (ranks + 1) / 2
        if not bool((tensor == total).all()):
            raise Problem(f"an all-reduce of {size} bytes gave {tensor.max().item()}, not {total}")
        best = max(best, _bandwidth(tensor.zero_(), size, ranks, device))
    return best


def _bandwidth(tensor: torch.Tensor, size: int, ranks: int, device: torch.device) -> float:
    for _ in range(_WARM_UP):
        dist.all_reduce(tensor)
    _wait(device)
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(tensor)
    _wait(device)
    seconds = (time.perf_counter() - started) / _ROUNDS
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ring(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of neighbouring pairs in which each node has at most one partner."""
    pairs = [(i, (i + 1) % nodes) for i in range(nodes if nodes > 2 else nodes - 1)]
    last = [pairs.pop()] if nodes % 2 and nodes > 2 else []
    return [part for part in (pairs[0::2], pairs[1::2], last) if part]


def measure_links(store: dist.Store, place: int, nodes: int) -> dict[tuple[int, int], float]:
    """Bandwidth with each neighbour in the ring, by one rank a node; 0 where it failed.

    `place` is this node's number among `nodes`. The default group must have been left.
    """
    found = {}
    for pairs in ring(nodes):
        for pair in pairs:
            if place in pair:
                found[pair] = _pair(store, pair, place)
    return found


def _pair(store: dist.Store, pair: tuple[int, int], place: int) -> float:
    try:
        device = join(store, f"pair/{pair[0]}-{pair[1]}", pair.index(place), 2, PAIR_SECONDS)
        return all_reduce(device)
    except (RuntimeError, ValueError):
        return 0.0
    finally:
        try:
            leave()
        except RuntimeError:
            pass


def slow_places(links: Mapping[tuple[int, int], float], nodes: int) -> list[int]:
    """Nodes all of whose links are slow or broken, if the others' are not; needs three nodes.

    A link is as slow as its slower end, so a single slow one says nothing of its two nodes.
    """
    if nodes < 3 or not links:
        return []
    bar = _SLOW * max(links.values())
    slow = {pair for pair, bandwidth in links.items() if bandwidth < bar or bandwidth == 0}
    named = [n for n in range(nodes) if all(p in slow for p in links if n in p)]
    return named if 2 * len(named) < nodes else []


def describe(links: Mapping[tuple[int, int], float], names: Sequence[str]) -> str:
    """`acc1-acc2 11.2, acc2-acc3 failed`, GB/s."""
    return ", ".join(
        f"{names[a]}-{names[b]} {f'{bandwidth:.2f}' if bandwidth else 'failed'}"
        for (a, b), bandwidth in sorted(links.items())
    )
