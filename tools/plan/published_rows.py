"""Speeds that others published, and the settings that they ran.

Each row says where it stands, what it leaves open and what is assumed there. Three rows calibrate
`SUSTAINED` in tools/plan/efficiency.py; all others only validate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig, TextConfig, VisionConfig
from models.pipeline_layout import chunk_layers
from tools.plan.efficiency import clock_at
from tools.plan.job import Gpu, Job, Software
from tools.plan.workload import Row

MEGATRON = "NVIDIA/Megatron-LM @d98e8a64, README.md and images/model_table.png"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge @0a25f911, docs/performance-summary-archive.md"
NEMO = "NVIDIA/NeMo @070a0bb1, docs/source/performance/performance_summary.md (NeMo 24.07)"
TITAN = "pytorch/torchtitan @31a17bfd, benchmarks/llama3_h100_202412_torchtitan.md"
TITAN_A100 = "pytorch/torchtitan @04133643, docs/performance.md"
TITAN_H200 = "pytorch/torchtitan @1af29373, benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md"
AUTOMODEL = "NVIDIA-NeMo/Automodel @2861c414, docs/performance-summary.mdx"

DGX_H100 = Gpu(989.4, 1978.9, 3350, 450, 50, 80, 8, True)
# 96 GB of HBM2e at 2.4 TB/s, 500 W, 400 Gb/s per GPU: TITAN.
GRAND_TETON = Gpu(989.4, 1978.9, 2400, 450, 50, 96, 8, True, clock_at(500, 700))
H200 = Gpu(989.4, 1978.9, 4800, 450, 50, 141, 8, True)
A100 = Gpu(312, None, 2039, 300, 25, 80, 8, False)  # its network is not stated: HDR assumed

LLAMA3_8B = TextConfig(4096, 14336, 32, 32, 8, 128, 128256, 8192)
LLAMA3_70B = TextConfig(8192, 28672, 80, 64, 8, 128, 128256, 8192)
LLAMA3_405B = TextConfig(16384, 53248, 126, 128, 8, 128, 128256, 8192)
LLAMA2_7B = TextConfig(4096, 11008, 32, 32, 32, 128, 32000, 4096)
LLAMA2_13B = TextConfig(5120, 13824, 40, 40, 40, 128, 32000, 4096)
LLAMA2_70B = TextConfig(8192, 28672, 80, 64, 8, 128, 32000, 4096)
# torchtitan's "selective op": every second product again (wk, wo, w3: 0.365 of Llama 3's), none of
# the attention, all element-wise kernels.
SELECTIVE_OP = (0.365, 0.0, 1.0)
FSDP = Software(zero3=True, chunked_loss=False)
# FlashAttention 2, the default of scaled_dot_product_attention in 2024 and 2025.
TORCH = Software(zero3=True, flash=2, chunked_loss=False, recomputed=SELECTIVE_OP)
EAGER = Software(zero3=True, flash=2, chunked_loss=False, recomputed=SELECTIVE_OP, fused=False)
NVIDIA = Software(chunked_loss=False, fused_gradients=True)
NVIDIA_TP = Software(chunked_loss=False, fused_gradients=True, tensor_overlap=True)
GPT = Software(gated=False, chunked_loss=False, fused_gradients=True, tensor_overlap=True)
LORA = Software(adapters=True, fused_gradients=True, chunked_loss=False)
LORA_HF = Software(adapters=True, fused=False, flash=3, chunked_loss=False)


@dataclass(frozen=True)
class Published:
    """One published speed."""

    name: str
    source: str
    tokens_per_gpu: float  # per second
    text: TextConfig
    gpu: Gpu
    gpus: int
    sequence: int
    global_batch: int  # sequences
    software: Software
    fp8: str | None = None
    micro_batch: int = 1
    layout: Mapping[str, Any] = field(default_factory=dict)  # of ParallelConfig
    calibrates: bool = False  # SUSTAINED
    assumed: str = ""


def gpt(hidden: int, layers: int, heads: int) -> TextConfig:
    """A row of Megatron-LM's table: GPT-3's shape, 131072 words."""
    return TextConfig(hidden, 4 * hidden, layers, heads, heads, hidden // heads, 131072, 4096)


def gpt_tokens(text: TextConfig, tflops: float) -> float:
    """Tokens per second of a TFLOP/s figure of that table.

    Megatron-LM counts 72 * layers * hidden^2 * (1 + s / (6 hidden) + V / (12 hidden layers)) per
    token: all pairs of the attention, not only causal ones (Narayanan et al. 2021, appendix).
    """
    layers, hidden, vocabulary, length = text.layers, text.hidden_size, text.vocab_size, 4096
    products = 72 * layers * hidden**2
    each = products * (1 + length / (6 * hidden) + vocabulary / (12 * hidden * layers))
    return tflops * 1e12 / each


def job_of(row: Published) -> Job:
    """The planner's view of a published run."""
    layout: dict[str, Any] = {"distributed_optimizer": True, "overlap_grad_reduce": True}
    layout |= {"overlap_param_gather": True, **row.layout}
    parallel = ParallelConfig(world_size=row.gpus, **layout)
    tokens = float(row.sequence * row.micro_batch)
    vision = VisionConfig(64, 64, 2, 2, 32, 16)  # not there
    model = ModelConfig("published", vision, row.text, 0)
    return Job(
        model=model,
        parallel=parallel,
        precision=PrecisionConfig(params="bf16", fp8_recipe=row.fp8),
        trained=frozenset() if row.software.adapters else frozenset({"language"}),
        row=Row(tokens, tokens, row.sequence, tokens),
        micro_batches=row.global_batch // (row.micro_batch * parallel.data),
        layers=tuple(chunk_layers(model, parallel)),
        gpu=row.gpu,
        software=row.software,
        has_vision=False,
    )


def _table(name: str, text: TextConfig, tensor: int, tflops: float, **more: Any) -> Published:
    layout = {"tensor": tensor, "sequence_parallel": tensor > 1}
    return Published(
        f"Megatron-LM {name}",
        MEGATRON,
        gpt_tokens(text, tflops),
        text,
        DGX_H100,
        48 * tensor,
        4096,
        192,
        GPT,
        micro_batch=4,
        layout=layout,
        assumed="BF16, 400 Gb/s per GPU, all 4 sequences of a replica one micro-batch",
        **more,
    )


def _titan(name: str, tokens: float, gpus: int, software: Software, fp8: str | None) -> Published:
    return Published(
        f"torchtitan 8B {name}, {gpus} H100",
        TITAN,
        tokens,
        LLAMA3_8B,
        GRAND_TETON,
        gpus,
        8192,
        2 * gpus,
        software,
        fp8,
        micro_batch=2,
        assumed="clock at 500 W by the square root",
    )


def _nvidia(
    name: str,
    source: str,
    tokens: float,
    text: TextConfig,
    gpus: int,
    sequence: int,
    batch: int,
    fp8: str | None,
    software: Software = NVIDIA,
    assumed: str = "",
    **layout: Any,
) -> Published:
    if layout.get("tensor", 1) > 1:
        layout["sequence_parallel"] = True
    return Published(
        name,
        source,
        tokens,
        text,
        DGX_H100,
        gpus,
        sequence,
        batch,
        software,
        fp8,
        layout=layout,
        assumed=assumed,
    )


OVERLAP = "tensor-parallel overlap, as its recipes"
ROWS: tuple[Published, ...] = (
    _table("1.7B, 48 H100", gpt(2048, 24, 16), 1, 408.8),
    _table("7.1B, 96 H100", gpt(4096, 30, 32), 2, 465.9, calibrates=True),
    _table("16B, 192 H100", gpt(6144, 32, 48), 4, 489.1, calibrates=True),
    _table("32B, 384 H100", gpt(7168, 48, 56), 8, 459.6),
    _titan("eager", 5762, 8, EAGER, None),
    _titan("compiled", 6667, 8, TORCH, None),
    _titan("FP8", 8532, 8, TORCH, "tensorwise"),
    _titan("eager", 5605, 128, EAGER, None),
    _titan("compiled", 6514, 128, TORCH, None),
    _titan("FP8", 8380, 128, TORCH, "tensorwise"),
    Published(
        "torchtitan 8B FP8, 32 H200", TITAN_H200, 10938, LLAMA3_8B, H200, 32, 8192, 64, TORCH,
        "tensorwise", 2,
    ),
    Published(
        "torchtitan 13B, 64 A100", TITAN_A100, 2162, LLAMA2_13B, A100, 64, 4096, 128,
        Software(zero3=True, flash=2, chunked_loss=False), None, 2,
        calibrates=True, assumed="compiled, 200 Gb/s per GPU",
    ),
    Published(
        "torchtitan 8B, 64 A100", TITAN_A100, 2973, LLAMA3_8B, A100, 64, 8192, 64, TORCH,
        assumed="compiled, 200 Gb/s per GPU",
    ),
    _nvidia(
        "Megatron-Bridge 8B FP8, 8 H100", BRIDGE, 14451, LLAMA3_8B, 8, 8192, 128, "tensorwise",
        FSDP, "five layers recomputed, as its recipe",
        recompute="full", recompute_layers=5,
    ),
    _nvidia(
        "Megatron-Bridge 70B FP8, 64 H100", BRIDGE, 1621, LLAMA3_70B, 64, 8192, 256, "tensorwise",
        NVIDIA_TP, OVERLAP, tensor=4, pipeline=8, virtual_pipeline=5,
    ),
    _nvidia(
        "Megatron-Bridge 70B FP8, batch 128", BRIDGE, 1602, LLAMA3_70B, 64, 8192, 128,
        "tensorwise", NVIDIA_TP, OVERLAP, tensor=4, pipeline=8, virtual_pipeline=5,
    ),
    _nvidia(
        "Megatron-Bridge 405B FP8, 1024 H100", BRIDGE, 311, LLAMA3_405B, 1024, 8192, 1536,
        "tensorwise", NVIDIA_TP, OVERLAP + "; 126 layers in 64 chunks",
        tensor=8, pipeline=8, virtual_pipeline=8, context=2,
    ),
    _nvidia("NeMo Llama 2 7B FP8, 8 H100", NEMO, 16847, LLAMA2_7B, 8, 4096, 128, "delayed"),
    _nvidia(
        "NeMo Llama 2 13B FP8, 16 H100", NEMO, 8646, LLAMA2_13B, 16, 4096, 128, "delayed",
        pipeline=4, virtual_pipeline=10,
    ),
    _nvidia(
        "NeMo Llama 2 70B FP8, 64 H100", NEMO, 1707, LLAMA2_70B, 64, 4096, 128, "delayed",
        NVIDIA_TP, OVERLAP, tensor=4, pipeline=4, virtual_pipeline=20,
    ),
    _nvidia(
        "NeMo Llama 3 8B FP8, 8 H100, CP2", NEMO, 12036, LLAMA3_8B, 8, 8192, 128, "delayed",
        context=2,
    ),
    _nvidia(
        "NeMo Llama 3 70B FP8, 64 H100, CP2", NEMO, 1533, LLAMA3_70B, 64, 8192, 128, "delayed",
        NVIDIA_TP, OVERLAP, tensor=4, pipeline=4, virtual_pipeline=5, context=2,
    ),
    _nvidia(
        "NeMo Llama 2 13B FP8 LoRA, 8 H100", NEMO, 14161, LLAMA2_13B, 8, 4096, 32, "delayed", LORA
    ),
    Published(
        "Automodel 8B LoRA BF16, 1 H100", AUTOMODEL, 12473, LLAMA3_8B, DGX_H100, 1, 4096, 32,
        LORA_HF, None, 2, assumed="Hugging Face's layers: eager element-wise kernels",
    ),
)  # fmt: skip
