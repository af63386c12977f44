"""AMALIA-VL's stages: published hours beside predictions for our recipe of each.

Published (model card amalia-llm/AMALIA-VL-DPO, amalia-llm.github.io's multimodal model card):
stage 1 on 8 H100 in 4 h, 500k pairs, 2k steps; stage 2 in 96 h on 64 H100 (card) or 128 H100
(documentation), 49k steps, context 16384; stage 3 in 8 h on 64 (card) or 12 h on 128
(documentation). All on MareNostrum 5.
"""

from typing import Any

from conf.compose import compose
from conf.schema import Config
from tools.plan.predict import Prediction, predict
from tools.plan.workload import row_samples

PAIRS = 500_000  # of stage 1


def amalia_rows() -> list[dict[str, Any]]:
    """One row for each published figure."""
    return [
        _stage1(8, 4.0),
        _stage2(64, 96.0),
        _stage2(128, 96.0),
        _stage3(64, 8.0),
        _stage3(128, 12.0),
    ]


def _config(stage: int, gpus: int) -> Config:
    return compose(
        [
            "model=amalia_vl_9b",
            "data=amalia",
            "cluster=mn5",
            f"stage=stage{stage}",
            f"parallel=h100_{gpus}",
            "precision=bf16",
            "run=published",
        ]
    )


def _row(
    found: Prediction, published: str, hours: float, ours: float, predicted: str, implied: str
) -> dict[str, Any]:
    gpus = found.config.parallel.world_size
    return {
        "name": f"{found.config.stage.name}, {gpus} H100",
        "published": published,
        "published_hours": hours,
        "predicted": predicted,
        "predicted_hours": ours,
        "error": ours / hours - 1,
        "implied": implied,
        "tokens_per_gpu": found.step.tokens_per_gpu,
    }


def _stage1(gpus: int, hours: float) -> dict[str, Any]:
    found = predict(_config(1, gpus))
    speed = found.step.tokens_per_gpu * gpus
    tokens = found.row.real / found.row.samples
    ours = PAIRS * tokens / speed / 3600
    fewer = speed * hours * 3600 / PAIRS
    return _row(
        found,
        f"{hours:g} h, 500k pairs once",
        hours,
        ours,
        f"{ours:.1f} h for 500k pairs of {tokens:,.0f} tokens",
        f"{fewer:,.0f} tokens a pair",
    )


def _stage2(gpus: int, hours: float) -> dict[str, Any]:
    found = predict(_config(2, gpus))
    ours, stage = found.cost.hours, found.config.stage
    tokens = hours / ours * stage.global_batch_size * found.row.real
    return _row(
        found,
        f"{hours:g} h, 49k steps",
        hours,
        ours,
        f"{ours:.1f} h, {stage.global_batch_size} packs of {stage.sequence_length} a step",
        f"{tokens / 1e6:.2f} M tokens a step ({tokens / found.row.real:.0f} packs)",
    )


def _stage3(gpus: int, hours: float) -> dict[str, Any]:
    found = predict(_config(3, gpus))
    ours, pairs = found.cost.hours, row_samples(found.config)
    return _row(
        found,
        f"{hours:g} h",
        hours,
        ours,
        f"{ours:.1f} h for {pairs / 1e3:,.0f}k pairs, reference pass included",
        f"{pairs * hours / ours / 1e3:,.0f}k pairs (100K to 1M are published)",
    )
