"""Reference log-probabilities of a preference stage: computed once, stored, reused.

The reference model is the predecessor, so its log-probabilities are constants of the data. One
pass without gradients writes them to `reference/DIGEST.parquet`; no second model is ever held.
The digest covers everything they depend on (weights, data, tokenizer, geometry, precision), and
nothing of the layout. The idea of the on-disk cache is open-instruct's.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from data_shards.durable import replacing
from pipeline.callbacks.progress import duration
from pipeline.objectives.preference import ReferenceObjective
from pipeline.step import run_schedule

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

PROGRESS_SECONDS = 5.0
Rows = dict[tuple[int, int], tuple[float, float]]
_SCHEMA = pa.schema(
    [
        ("data_set", pa.int32()),
        ("row", pa.int64()),
        ("chosen", pa.float32()),
        ("rejected", pa.float32()),
    ]
)


def reference_digest(trainer: Trainer) -> str:
    """SHA-256 over all that the stored numbers depend on."""
    config, data = trainer.config, trainer.data
    value = {
        "format": 1,
        "checkpoint": trainer.check_predecessor().checkpoint_digest,
        "data_sets": data.manifest_digests,
        "tokenizer": data.tokenizer.digest(),
        "geometry": data.geometry.digest(),
        "model": asdict(config.model),
        "precision": asdict(config.precision),
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def reference_log_probs(trainer: Trainer) -> Rows:
    """All pairs of the stage's mixture; read from disk or computed by all ranks together.

    Raises:
        ValueError: the stored file is damaged or does not cover the data.
    """
    digest = reference_digest(trainer)
    path = trainer.stage_dir / "reference" / f"{digest[:16]}.parquet"
    stored = [path.is_file()]
    dist.broadcast_object_list(stored, src=0)
    if not stored[0]:
        trainer.load_predecessor()
        rows = _compute(trainer)
        if trainer.ranks.reports:
            _write(path, rows, digest)
        dist.barrier()
    rows = read_reference(path, digest)
    expected = len(trainer.data.everything.samples)
    if len(rows) != expected:
        raise ValueError(
            f"{path} has {len(rows)} pairs, the data has {expected}; remove the file "
            "to compute it again"
        )
    return rows


def _compute(trainer: Trainer) -> Rows:
    ranks, stage = trainer.ranks, trainer.config.stage
    objective = ReferenceObjective(ranks.context, ranks.context_size)
    # Every data-parallel rank's rows live on its last stage; tensor and context peers agree.
    found: Rows = {}
    trainer.model.eval()
    started = said = time.monotonic()
    total = trainer.data.everything.steps
    for step, micro_batches in trainer.data.every_sample():
        with torch.no_grad():
            reports = run_schedule(
                trainer.model, objective, micro_batches, stage, ranks.device, forward_only=True
            )
        for report in reports:
            for key, value in zip(
                report["ids"].tolist(), report["log_probs"].tolist(), strict=True
            ):
                found[key[0], key[1]] = (value[0], value[1])
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS or step + 1 == total:
            left = (now - started) / (step + 1) * (total - step - 1)
            trainer.say(f"reference log-probabilities {step + 1}/{total}  ETA {duration(left)}")
            said = now
    parts: list[Rows | None] = [None] * ranks.world_size
    dist.all_gather_object(parts, found if ranks.last_stage else {})
    return {key: value for part in parts if part for key, value in part.items()}


def _write(path: Path, rows: Rows, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = sorted(rows)
    table = pa.table(
        {
            "data_set": [key[0] for key in keys],
            "row": [key[1] for key in keys],
            "chosen": [rows[key][0] for key in keys],
            "rejected": [rows[key][1] for key in keys],
        },
        schema=_SCHEMA.with_metadata({"digest": digest}),
    )
    with replacing(path) as file:
        pq.write_table(table, file)


def read_reference(path: Path, digest: str) -> Rows:
    """Parse a reference file and check that it belongs here.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    remedy = "remove the file to compute it again"
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from None
    metadata = table.schema.metadata or {}
    if metadata.get(b"digest") != digest.encode() or table.schema.names != _SCHEMA.names:
        raise ValueError(f"{path} belongs to other weights or data; {remedy}")
    columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
    return {(d, r): (chosen, rejected) for d, r, chosen, rejected in zip(*columns, strict=True)}
