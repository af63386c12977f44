"""Published speeds that were predicted once, after every constant of the planner was settled.

Those of published_rows.py were at hand while the model was written. These show how it does on runs
it was not made for: other widths, vocabularies, sequence lengths and layouts.
"""

import dataclasses
from typing import Any

from conf.schema import TextConfig
from tools.plan.job import Software
from tools.plan.published_rows import (
    A100,
    AUTOMODEL,
    BRIDGE,
    DGX_H100,
    GRAND_TETON,
    LLAMA2_7B,
    LLAMA3_8B,
    LLAMA3_70B,
    LORA,
    LORA_HF,
    NEMO,
    NVIDIA,
    NVIDIA_TP,
    OVERLAP,
    TITAN,
    TITAN_A100,
    TORCH,
    Published,
)

FULL = dataclasses.replace(TORCH, recomputed=None)
# NeMo's GPT-3 and Nemotron shapes (NVIDIA/NeMo-Megatron-Launcher, launcher_scripts/conf/training).
GPT_5B = TextConfig(4096, 16384, 24, 32, 32, 128, 51200, 2048)
GPT_20B = TextConfig(6144, 24576, 44, 48, 48, 128, 51200, 2048)
GPT_175B = TextConfig(12288, 49152, 96, 96, 96, 128, 51200, 2048)
NEMOTRON_8B = TextConfig(4096, 16384, 32, 32, 32, 128, 256000, 4096)
NEMOTRON_22B = TextConfig(6144, 24576, 40, 48, 48, 128, 256000, 4096)
QWEN_7B = TextConfig(3584, 18944, 28, 28, 4, 128, 152064, 4096)
PLAIN = Software(gated=False, chunked_loss=False, fused_gradients=True)
PLAIN_TP = dataclasses.replace(PLAIN, tensor_overlap=True)


def _nemo(
    name: str,
    tokens: float,
    text: TextConfig,
    gpus: int,
    sequence: int,
    batch: int,
    micro_batch: int,
    software: Software,
    source: str = NEMO,
    fp8: str = "delayed",
    **layout: Any,
) -> Published:
    if layout.get("tensor", 1) > 1:
        layout["sequence_parallel"] = True
    overlapped = OVERLAP if software.tensor_overlap else ""
    return Published(
        name, source, tokens, text, DGX_H100, gpus, sequence, batch, software, fp8, micro_batch,
        layout, assumed=overlapped,
    )  # fmt: skip


def _long(context: int, length: int, tokens: float) -> Published:
    return Published(
        f"torchtitan 8B FP8, {length // 1024} k tokens, CP{context}",
        TITAN,
        tokens,
        LLAMA3_8B,
        GRAND_TETON,
        8,
        length,
        8 // context,
        FULL,
        "tensorwise",
        layout={"recompute": "full", "context": context},
        assumed="clock at 500 W by the square root",
    )


LATER: tuple[Published, ...] = (
    _nemo("NeMo GPT 5B FP8, 64 H100", 22521, GPT_5B, 64, 2048, 2048, 4, PLAIN),
    _nemo("NeMo GPT 20B FP8, 64 H100", 5851, GPT_20B, 64, 2048, 256, 2, PLAIN_TP, tensor=2),
    _nemo(
        "NeMo GPT 175B FP8, 128 H100", 726, GPT_175B, 128, 2048, 256, 1, PLAIN_TP,
        tensor=4, pipeline=8, virtual_pipeline=6,
    ),
    _nemo(
        "NeMo GPT 175B FP8, 512 H100", 782, GPT_175B, 512, 2048, 2048, 2, PLAIN_TP,
        tensor=4, pipeline=8, virtual_pipeline=6,
    ),
    _nemo(
        "NeMo Nemotron 8B FP8, 64 H100", 12701, NEMOTRON_8B, 64, 4096, 256, 4, PLAIN_TP, tensor=2,
    ),
    _nemo(
        "NeMo Nemotron 22B FP8, 64 H100", 4256, NEMOTRON_22B, 64, 4096, 256, 2, PLAIN_TP,
        tensor=2, pipeline=4, virtual_pipeline=10,
    ),
    _nemo("NeMo Llama 2 7B FP8 SFT, 8 H100", 17120, LLAMA2_7B, 8, 4096, 32, 1, NVIDIA),
    _nemo("NeMo Llama 2 7B FP8 LoRA, 8 H100", 25206, LLAMA2_7B, 8, 4096, 32, 1, LORA),
    _nemo(
        "Megatron-Bridge 70B FP8 SFT, 32 H100", 1638, LLAMA3_70B, 32, 4096, 32, 1, NVIDIA_TP,
        BRIDGE, "tensorwise", tensor=4, pipeline=4, virtual_pipeline=5,
    ),
    Published(
        "Automodel Qwen 2.5 7B LoRA BF16, 1 H100", AUTOMODEL, 14110, QWEN_7B, DGX_H100, 1, 4096, 32,
        LORA_HF, None, 2, assumed="Hugging Face's layers: eager element-wise kernels",
    ),
    Published(
        "torchtitan 70B, 64 A100", TITAN_A100, 331, LLAMA3_70B, A100, 64, 8192, 64, FULL,
        layout={"recompute": "full"}, assumed="compiled, 200 Gb/s per GPU",
    ),
    _long(1, 32768, 3890),
    _long(2, 65536, 2540),
    _long(4, 131072, 1071),
    _long(8, 262144, 548),
)  # fmt: skip
