"""Tiny configurations to simulate, and one that runs on real ranks as well."""

from __future__ import annotations

import dataclasses
from typing import Any

from conf.compose import compose
from conf.schema import Config
from tests.models.tiny import tiny_model
from tools.dryrun.report import RankReport
from tools.dryrun.sample import choose


def tiny_config(stage: str = "stage2", **parallel: Any) -> Config:
    """Two layers a pipeline chunk, packs of 320 tokens, as many packs as the schedule wants."""
    config = compose(["model=tiny", f"stage={stage}", "parallel=single"])
    layout = dataclasses.replace(config.parallel, **parallel)
    return dataclasses.replace(
        config,
        model=tiny_model(),
        parallel=layout,
        stage=dataclasses.replace(
            config.stage,
            sequence_length=320,
            document_multiple=4,
            micro_batch_size=1,
            global_batch_size=2 * layout.pipeline * layout.data,
        ),
    )


def simulate_sample(config: Config) -> tuple[list[RankReport], list[RankReport]]:
    """The ranks that `ranks=sample` steps, and those of which it sees the checkpoint only."""
    from tools.dryrun.rank import simulate

    sample = choose(config.parallel, "sample")
    stepped = [simulate(config, rank) for rank in sample.ranks]
    return stepped, [simulate(config, rank, steps=0) for rank in sample.writers]
