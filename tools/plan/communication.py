"""Seconds of NCCL's collectives, by where a group's ranks stand.

Megatron numbers ranks tensor first, then context, data and pipeline; a node holds consecutive ones.
"""

from dataclasses import dataclass

from tools.plan.job import Gpu, Job

# Bus bandwidth of large collectives beside the links' data sheet. NVLink: 340-360 of 450 GB/s
# (NVIDIA/nccl issue 1264: 376-380 for one copy). Network: 40-45 of 50 GB/s on NDR.
NODE_SHARE = 0.77
NETWORK_SHARE = 0.85
NODE_LATENCY = 12e-6
NETWORK_LATENCY = 25e-6  # and with each further node:
HOP = 3e-6
# What a hidden collective still costs: its kernels take multiprocessors and memory bandwidth from
# the products that hide it (0.15 in Isaev et al. 2023, "Calculon", for NVLink).
HIDDEN_COST = 0.15


@dataclass(frozen=True)
class Group:
    """Ranks that communicate."""

    size: int
    on_a_node: int  # of them

    def bandwidth(self, gpu: Gpu) -> float:
        """Bytes per second that each rank sends (and receives) in a ring."""
        inside = gpu.node_bandwidth * NODE_SHARE
        if self.size <= self.on_a_node:
            return inside * 1e9
        return min(inside, self.on_a_node * gpu.network_bandwidth * NETWORK_SHARE) * 1e9

    def latency(self) -> float:
        """Seconds of a collective of no bytes."""
        if self.size <= self.on_a_node:
            return NODE_LATENCY
        return NETWORK_LATENCY + HOP * self.size / self.on_a_node


def group(job: Job, stride: int, size: int) -> Group:
    """Every `stride`-th rank, `size` of them."""
    return Group(size, max(1, min(size, job.gpu.per_node // stride)))


def tensor_group(job: Job) -> Group:
    return group(job, 1, job.parallel.tensor)


def context_group(job: Job) -> Group:
    return group(job, job.parallel.tensor, job.parallel.context)


def replica_group(job: Job) -> Group:
    """Ranks with the same weights, which share gradients and optimizer: data and context."""
    parallel = job.parallel
    return group(job, parallel.tensor, parallel.context * parallel.data)


def ring_seconds(gpu: Gpu, ranks: Group, size: float) -> float:
    """All-gather to, or reduce-scatter of, `size` bytes on each rank."""
    if ranks.size == 1 or size <= 0:
        return 0.0
    return size * (ranks.size - 1) / ranks.size / ranks.bandwidth(gpu) + ranks.latency()


def all_reduce_seconds(gpu: Gpu, ranks: Group, size: float) -> float:
    """All-reduce of `size` bytes: a reduce-scatter and an all-gather."""
    return 2 * ring_seconds(gpu, ranks, size)


def send_seconds(job: Job, size: float) -> float:
    """One rank to its counterpart on the next pipeline stage."""
    parallel, gpu = job.parallel, job.gpu
    neighbours = parallel.tensor * parallel.context * parallel.data * 2 <= gpu.per_node
    bandwidth = (
        gpu.node_bandwidth * NODE_SHARE if neighbours else gpu.network_bandwidth * NETWORK_SHARE
    )
    return size / (bandwidth * 1e9) + (NODE_LATENCY if neighbours else NETWORK_LATENCY)


def exposed(seconds: float, behind: float) -> float:
    """What is seen of a collective that runs beside `behind` seconds of work."""
    hidden = min(seconds, 0.9 * behind)
    return seconds - hidden + HIDDEN_COST * hidden
