"""The loss over a large vocabulary: all logits at once, the targets' only, chunk by chunk."""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig, TextConfig, VisionConfig
from tools.benchmarks import machine
from tools.benchmarks.memory import peak_gb, reset_peak, resident_gb
from tools.benchmarks.synthetic import Mixture, packed_row
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, spread, take_turns

TOKENS, VOCABULARY, HIDDEN = 2048, 65536, 256
WHOLE, TARGETS = "logits of the whole row", "logits of the targets, all at once"
METHOD = f"""
Forward and backward of a decoder of one layer, {HIDDEN} wide, with a vocabulary of {VOCABULARY}
over a row of {TOKENS} tokens, a third of them targets; float32. First row: logits of every token,
then torch's cross-entropy, as transformers computes it. The others are
`models/vocabulary_loss.py`: logits of the targets only, kept for the backward pass, or of so many
targets at a time, computed again there. Memory is what the process grew by above its size before,
at its peak.
"""


def loss_model(vocabulary: int = VOCABULARY, hidden: int = HIDDEN) -> ModelConfig:
    """One decoder layer under a large vocabulary."""
    return ModelConfig(
        name="loss",
        vision=VisionConfig(32, 48, 2, 4, image_size=32, patch_size=8),
        text=TextConfig(hidden, 2 * hidden, 1, 4, 4, hidden // 4, vocabulary, 8192),
        image_token_id=vocabulary - 1,
        max_tiles=1,
    )


def loss_side(
    model: ModelConfig, tokens: int, chunk: int | None, threads: int
) -> Callable[[], dict[str, float]]:
    """`chunk` tokens at a time, 0 for all targets, None for logits of the whole row."""
    from models.build import build_model
    from pipeline.batch import DeviceBatch
    from tools.benchmarks.training import alone

    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = alone()
    device = context.__enter__()
    parallel = ParallelConfig(loss_chunk=chunk or 0)
    network = build_model(
        model, parallel, PrecisionConfig(), pre_process=True, post_process=True
    ).train()
    batch = packed_row(model, tokens, Mixture(images=()), seed=0)
    inputs = DeviceBatch.from_packed(batch, device).model_inputs()
    labels_T, mask_T = inputs["labels_T"], torch.from_numpy(batch.loss_mask_T)
    assert isinstance(labels_T, torch.Tensor)
    if chunk is None:
        inputs.pop("labels_T"), inputs.pop("loss_mask_T")

    def turn() -> dict[str, float]:
        for parameter in network.parameters():
            parameter.grad = None
        gc.collect()
        reset_peak()
        before, started = resident_gb(), time.perf_counter()
        output = network(**inputs)
        if chunk is None:
            ignored_T = torch.where(mask_T > 0, labels_T, -100)
            logits_TV = output.reshape(tokens, -1).float()
            loss = F.cross_entropy(logits_TV, ignored_T, reduction="sum")
        else:
            loss = (output.reshape(-1) * mask_T).sum()
        loss.backward()
        return {
            "seconds": time.perf_counter() - started,
            "extra_gb": peak_gb() - before,
            "loss": float(loss.detach()),
            "tokens": float(tokens),
        }

    turn.alone = context  # type: ignore[attr-defined]  # kept open
    return turn


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "chunked loss against whole logits"."""
    model = loss_model()
    chunks: dict[str, int | None] = {WHOLE: None, TARGETS: 0}
    chunks |= {f"logits of {chunk} targets at a time": chunk for chunk in (512, 128)}
    sides = [
        Side(name, loss_side, {"model": model, "tokens": TOKENS, "chunk": c, "threads": threads})
        for name, c in chunks.items()
    ]
    taken = take_turns(sides, turns, say=say)
    losses = [taken.value(side.name, "loss") for side in sides]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise ValueError(f"the sides do not compute the same loss ({losses}); nothing is compared")
    warning = machine.disturbed(taken.others)
    return Section(
        title="Loss over a large vocabulary",
        method=METHOD,
        columns=["how", "seconds", "peak memory, GB", "speed against the first row"],
        rows=[
            [
                side.name,
                taken.value(side.name, "seconds"),
                taken.value(side.name, "extra_gb"),
                spread(taken.ratios(side.name, WHOLE, "tokens")),
            ]
            for side in sides
        ],
        facts=machine.facts(),
        notes=[warning] if warning else [],
        settings={"threads": threads, "turns": turns},
        data={"reports": taken.reports, "others": taken.others},
    )
