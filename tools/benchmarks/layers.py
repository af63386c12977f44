"""Megatron's local layers against transformers' Llama: the decoder alone, nothing to pack."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig, TextConfig, VisionConfig
from tools.benchmarks import machine
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, spread, take_turns

# hidden size -> (documents, tokens of each, passes in a turn)
SHAPES = {128: (16, 128, 8), 512: (8, 128, 2)}
METHOD = """
Decoder of four layers and its output layer (832 words), forward and backward over documents of
equal length, so that neither side pads; float32, the same weights, logits compared first. Ours
packs the documents into one row with Megatron's local layers (`models/packed_attention.py`
inside); transformers takes them as a batch. What is left is the two implementations' own cost.
"""


def decoder_model(hidden: int) -> ModelConfig:
    """A decoder of four layers, as in the demo's model, `hidden` wide."""
    return ModelConfig(
        name=f"decoder-{hidden}",
        vision=VisionConfig(32, 48, 2, 4, image_size=32, patch_size=8),
        text=TextConfig(hidden, 5 * hidden // 2, 4, hidden // 32, hidden // 64, 32, 832, 2048),
        image_token_id=768,
        max_tiles=1,
    )


def _timed(
    forward: Callable[[], torch.Tensor], parameters: Any, tokens: int, passes: int
) -> Callable:  # type: ignore[type-arg]
    with torch.no_grad():
        check = float(forward().float().pow(2).mean())
    parameters = list(parameters)

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(passes):
            for parameter in parameters:
                parameter.grad = None
            forward().float().pow(2).mean().backward()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": float(passes * tokens), "check": check}

    return turn


def _ids(model: ModelConfig, documents: int, length: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(1, 700, (documents, length), generator=draw)


def transformers_decoder(
    model: ModelConfig, documents: int, length: int, passes: int, threads: int
) -> Any:
    """`LlamaForCausalLM` inside the twin."""
    from tools.benchmarks.sides import twin

    torch.set_num_threads(threads)
    language = twin(model).train()
    ids = _ids(model, documents, length)
    inner = language.model.language_model

    def forward() -> torch.Tensor:
        hidden = inner(input_ids=ids, use_cache=False).last_hidden_state
        logits: torch.Tensor = language.lm_head(hidden)
        return logits

    return _timed(
        forward, [*inner.parameters(), *language.lm_head.parameters()], ids.numel(), passes
    )


def our_decoder(model: ModelConfig, documents: int, length: int, passes: int, threads: int) -> Any:
    """The `language_model` of `LlavaNext`, documents packed into one row."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from models.build import build_model
    from models.hf_state import from_hf
    from tools.benchmarks.sides import twin
    from tools.benchmarks.training import alone

    weights = from_hf(twin(model).state_dict(), model)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = alone()
    context.__enter__()
    network = build_model(
        model, ParallelConfig(), PrecisionConfig(), pre_process=True, post_process=True
    ).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])
    ids = _ids(model, documents, length)
    cu_seqlens = torch.arange(documents + 1, dtype=torch.int32) * length
    positions = torch.arange(length).repeat(documents)[None]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )

    def forward() -> torch.Tensor:
        logits: torch.Tensor = network.language_model(
            input_ids=ids.reshape(1, -1),
            position_ids=positions,
            attention_mask=None,
            packed_seq_params=packed,
        )
        return logits

    turn = _timed(forward, network.language_model.parameters(), ids.numel(), passes)
    turn.alone = context  # type: ignore[attr-defined]  # kept open
    return turn


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "Megatron's local layers against transformers"."""
    sides = []
    for hidden, (documents, length, passes) in SHAPES.items():
        arguments = {
            "model": decoder_model(hidden),
            "documents": documents,
            "length": length,
            "passes": passes,
            "threads": threads,
        }
        sides.append(Side(f"transformers, {hidden} wide", transformers_decoder, arguments))
        sides.append(Side(f"ours, {hidden} wide", our_decoder, arguments))
    taken = take_turns(sides, turns, say=say)
    rows: list[list[str | float | int | None]] = []
    for theirs, ours in zip(sides[::2], sides[1::2], strict=True):
        checks = [taken.value(side.name, "check") for side in (theirs, ours)]
        if abs(checks[0] - checks[1]) > 1e-4 * abs(checks[0]):
            raise ValueError(f"the two decoders differ ({checks}); nothing is compared")
        rows.append([theirs.name, taken.median(theirs.name, "tokens"), ""])
        ratio = spread(taken.ratios(ours.name, theirs.name, "tokens"))
        rows.append([ours.name, taken.median(ours.name, "tokens"), ratio])
    warning = machine.disturbed(taken.others)
    return Section(
        title="Local layers against transformers",
        method=METHOD,
        columns=["decoder", "tokens/s", "ours against transformers"],
        rows=rows,
        facts=machine.facts(),
        notes=[warning] if warning else [],
        settings={"threads": threads, "turns": turns},
        data={"reports": taken.reports, "others": taken.others},
    )
