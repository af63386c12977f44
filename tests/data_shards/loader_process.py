"""One replica that reads batches and writes down what it got, to be killed at any moment.

`main([FILE])` reads the settings from FILE; after every step it appends to `out` one line: the step
and a digest of each pack of this replica.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer
from data_shards.loader import Loader
from data_shards.manifest import read_manifest
from data_shards.plan import Plan
from data_shards.plan_file import ensure_plan
from tests.data_shards import toys

WEIGHTS = {"chats": 0.7, "more": 0.3}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one replica is told."""

    root: str
    tokenizer: str
    steps: int
    batch: int  # packs
    rank: int
    size: int
    micro_batch_size: int
    workers: int
    start: int
    hold: int  # steps after which it waits to be killed, as a rank waits for the others
    out: str


def plan_of(settings: Settings) -> tuple[Plan, dict[str, Any]]:
    """The plan and the manifests; whoever comes first writes the plan."""
    manifests = {
        name: read_manifest(Path(settings.root) / name / "manifest.parquet") for name in WEIGHTS
    }
    stage = toys.stage(global_batch_size=settings.batch, steps=settings.steps, document_multiple=4)
    data = toys.data_config(Path(settings.root), Path(settings.tokenizer))
    data.mix = {stage.name: WEIGHTS}
    folder = Path(settings.root) / "plan"
    return ensure_plan("training", folder, manifests, data, stage), manifests


def batches(settings: Settings) -> Iterator[tuple[int, list[PackedBatch]]]:
    """(step, micro-batches) of this replica."""
    plan, manifests = plan_of(settings)
    loader = Loader(
        plan,
        manifests,
        ChatTokenizer.from_directory(settings.tokenizer),
        toys.GEOMETRY,
        micro_batch_size=settings.micro_batch_size,
        dp_rank=settings.rank,
        dp_size=settings.size,
        workers=settings.workers,
    )
    return loader.batches(settings.start)


def packs_of(batch: PackedBatch, length: int) -> Iterator[str]:
    """A digest of each pack of a micro-batch, in terms that do not depend on its neighbours."""
    table = toys.GEOMETRY.grid**2
    newline = len(batch.tiles_NCHW) * table
    for start in range(0, len(batch.tokens_T), length):
        inside = slice(start, start + length)
        mine = (batch.image_positions_P >= start) & (batch.image_positions_P < start + length)
        rows = batch.image_rows_P[mine]
        patches = rows[rows != newline]
        first, last = (patches.min() // table, patches.max() // table) if len(patches) else (0, -1)
        ends = batch.cu_seqlens[(batch.cu_seqlens > start) & (batch.cu_seqlens <= start + length)]
        content = hashlib.blake2b(digest_size=16)
        for part in (
            batch.tokens_T[inside],
            batch.labels_T[inside],
            batch.loss_mask_T[inside],
            batch.position_ids_T[inside],
            ends - start,
            batch.image_positions_P[mine] - start,
            np.where(rows == newline, -1, rows - first * table),
            batch.tiles_NCHW[first : last + 1],
        ):
            content.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        yield content.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Deliver until the plan ends or somebody kills this process."""
    settings = Settings(**json.loads(Path(arguments[0]).read_text()))
    out = os.open(settings.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step, micro_batches in batches(settings):
        if step == settings.start + settings.hold:
            time.sleep(3600)
        found = [digest for batch in micro_batches for digest in packs_of(batch, 512)]
        os.write(out, json.dumps([step, found]).encode() + b"\n")
