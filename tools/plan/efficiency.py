"""Seconds of one kernel on one GPU: matrix products, attention, memory traffic.

One constant, `SUSTAINED`, was set on the three rows of tools/plan/published_rows.py that say so;
all others are data sheets or measurements of single kernels that others published. docs/planner.md
has the sources.
"""

import functools
import math

from tools.plan.job import Gpu

# Share of the data sheet's TFLOP/s that one large matrix product reaches by itself: 780-790 of 989
# on an H100 (gist Chillee/2ec89696; 788 measured by us on an H200), 271 of 312 on an A100
# (stas00/ml-engineering, maximum achievable matmul FLOPS).
PRODUCT_BF16 = {True: 0.80, False: 0.87}  # Hopper, Ampere
# FP8 products are 1.95 times as fast: 1661 beside 853 TFLOP/s on an H200 NVL
# (xzwgit/gpu-flops-bench).
PRODUCT_FP8 = 0.78
# What training leaves of it, minute after minute: clocks fall to the power limit, operands are not
# in the cache, kernels wait for each other. The one calibrated constant.
SUSTAINED = 0.783
# Tiles of the output that one multiprocessor computes at a time, and what smaller ones lose.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.92), (64, 128, 0.75))
PROLOGUE = 160  # as if the inner dimension were so much longer: filling and draining the pipeline
# FlashAttention: share of BF16 peak, (forward, backward), head_dim 128, long sequences, causal.
# FA3 and cuDNN 9 on H100: 550, 610, 650 TFLOP/s forward and 450, 500, 530 backward at 4, 8, 16 k
# (Shah et al. 2024, figures 5-6); FA2 on H100: 370-400 and 300-330; FA2 on A100: 190-200 and
# 170-180 of 312 (Dao 2023, figures 5-6).
ATTENTION = {(3, True): (0.67, 0.55), (2, True): (0.41, 0.34), (2, False): (0.66, 0.58)}
ATTENTION_HALF = 700  # tokens of a document at which attention reaches half of it
BACKWARD_PRODUCTS = 2.5  # products of attention's backward pass per one of the forward pass
MEMORY = 0.82  # share of the data sheet's memory bandwidth that a streaming kernel reaches
GAP = 2.0e-6  # seconds between two kernels
# A lower power limit lowers the clock about with its square root (voltage falls with frequency).
POWER_EXPONENT = 0.5


def clock_at(watts: float, full: float) -> float:
    """Clock under a power limit beside that under the full one."""
    return (watts / full) ** POWER_EXPONENT


@functools.lru_cache(maxsize=1 << 16)
def product_share(gpu: Gpu, m: float, n: float, k: float) -> float:
    """What is left of the best rate for an [m, k] x [k, n] product, 0 to 1.

    Output tiles go to multiprocessors in waves, the last of which is partly idle; a short inner
    dimension leaves the pipeline of each tile half filled.
    """
    best = 0.0
    for rows, columns, speed in TILES:
        count = math.ceil(m / rows) * math.ceil(n / columns)
        filled = (m / rows) * (n / columns) / count  # of the tiles at the edges
        waves = count / gpu.sms
        best = max(best, speed * filled * waves / math.ceil(waves))
    return best * k / (k + PROLOGUE)


@functools.lru_cache(maxsize=1 << 16)
def product_seconds(gpu: Gpu, m: float, n: float, k: float, fp8: bool = False) -> float:
    """One [m, k] x [k, n] matrix product."""
    if min(m, n, k) <= 0:
        return 0.0
    share = product_share(gpu, m, n, k) * gpu.clock * SUSTAINED
    if fp8 and gpu.fp8_tflops:
        rate, element = gpu.fp8_tflops * PRODUCT_FP8, 1
    else:
        rate, element = gpu.tflops * PRODUCT_BF16[gpu.hopper], 2
    traffic = element * (m * k + k * n) + 2 * m * n
    return max(2 * m * n * k / (rate * 1e12 * share), stream_seconds(gpu, traffic)) + GAP


def attention_seconds(
    gpu: Gpu, flops: float, length: float, flash: int, backward: bool, head_dim: int = 128
) -> float:
    """Fused attention that needs `flops` in its forward pass, documents of `length` tokens."""
    if flops <= 0:
        return 0.0
    share = ATTENTION[(flash if gpu.hopper else 2, gpu.hopper)][backward]
    # Products over the head dimension use the units for 128 whole.
    share *= min(1.0, head_dim / 128) ** 0.5 * length / (length + ATTENTION_HALF)
    share *= gpu.clock * SUSTAINED
    work = flops * (BACKWARD_PRODUCTS if backward else 1.0)
    return work / (gpu.tflops * 1e12 * share) + GAP


def stream_seconds(gpu: Gpu, traffic: float) -> float:
    """`traffic` bytes read and written by kernels that do little else."""
    return traffic / (gpu.bandwidth * 1e9 * MEMORY)
