"""Reference log-probabilities of a preference stage: computed once, stored, reused.

    python -m pipeline.reference --config FILE --part K --parts N

The reference model is the predecessor, so its log-probabilities are constants of the data. One
pass without gradients writes them to `reference/DIGEST.parquet`; no second model is ever held.
The digest covers everything they depend on (weights, data, tokenizer, geometry, precision), and
nothing of the layout. The idea of the on-disk cache is open-instruct's.

The command computes one part (from 0) of the pass before the stage begins; it runs on ranks like
pipeline.train.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from conf.schema import Config
from pipeline.callbacks.progress import duration
from pipeline.objectives.preference import ReferenceObjective
from pipeline.reference_parts import (
    Rows,
    find,
    listed,
    packing_digest,
    part_path,
    read_part,
    read_rows,
    write_rows,
)
from pipeline.step import run_schedule

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

PROGRESS_SECONDS = 5.0


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

    What parts hold already is taken from them; they are removed once the whole file is written.

    Raises:
        ValueError: the stored file is damaged or does not cover the data.
    """
    digest = reference_digest(trainer)
    path, everything = whole_path(trainer, digest), trainer.data.everything
    stored: Rows = {}
    # Global batches to compute; None where the file is there.
    missing: list[list[int] | None] = [None]
    if trainer.ranks.reports and not path.is_file():
        found = find(path, digest, everything)
        stored, missing[0] = found.rows, found.missing
        for problem in found.problems:
            trainer.say(f"WARNING: passed over {problem}")
        if stored:
            trainer.say(f"{len(stored)} reference pairs are there in parts")
    dist.broadcast_object_list(missing, src=0)
    if missing[0] is not None:
        computed = compute(trainer, missing[0])
        if trainer.ranks.reports:
            write_rows(path, {**stored, **computed}, digest=digest)
            for _, _, part in listed(path):
                part.unlink(missing_ok=True)
        dist.barrier()
    rows = read_rows(path, digest=digest)
    expected = len(everything.samples)
    if len(rows) != expected:
        raise ValueError(
            f"{path} has {len(rows)} pairs, the data has {expected}; remove the file "
            "to compute it again"
        )
    return rows


def whole_path(trainer: Trainer, digest: str) -> Path:
    """Where the numbers of all pairs are stored."""
    return trainer.stage_dir / "reference" / f"{digest[:16]}.parquet"


def compute(trainer: Trainer, steps: Sequence[int]) -> Rows:
    """The pairs of these global batches, by all ranks together; known to every rank."""
    if not steps:
        return {}
    trainer.load_predecessor()
    ranks, stage = trainer.ranks, trainer.config.stage
    objective = ReferenceObjective(ranks.context, ranks.context_size)
    # Every data-parallel rank's rows live on its last stage; tensor and context peers agree.
    found: Rows = {}
    for model in trainer.models:
        model.eval()
    started = said = time.monotonic()
    for done, (_, micro_batches) in enumerate(trainer.data.every_sample(steps), 1):
        with torch.no_grad():
            reports = run_schedule(
                trainer.models, objective, micro_batches, stage, ranks.device, forward_only=True
            )
        for report in reports:
            for key, value in zip(
                report["ids"].tolist(), report["log_probs"].tolist(), strict=True
            ):
                found[key[0], key[1]] = (value[0], value[1])
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS or done == len(steps):
            left = (now - started) / done * (len(steps) - done)
            trainer.say(f"reference log-probabilities {done}/{len(steps)}  ETA {duration(left)}")
            said = now
    parts: list[Rows | None] = [None] * ranks.world_size
    dist.all_gather_object(parts, found if ranks.last_stage else {})
    return {key: value for part in parts if part for key, value in part.items()}


def write_part(trainer: Trainer, part: int, parts: int) -> Path:
    """Compute and store one part, unless it or the whole is there; returns the file that is.

    Raises:
        ValueError: the stage before is not done, or does not fit.
    """
    digest = reference_digest(trainer)
    plan, whole = trainer.data.everything, whole_path(trainer, digest)
    path = part_path(whole, part, parts)
    there: list[Path | None] = [None]
    if trainer.ranks.reports:
        if whole.is_file():
            there[0] = whole
        elif path.is_file():
            try:
                read_part(path, digest, plan, part, parts)
                there[0] = path
            except ValueError as error:
                trainer.say(f"WARNING: {error}; it is computed again")
    dist.broadcast_object_list(there, src=0)
    if there[0] is not None:
        trainer.say(f"{there[0]} is there already")
        return there[0]
    rows = compute(trainer, range(part, plan.steps, parts))
    if trainer.ranks.reports:
        write_rows(path, rows, digest=digest, packing=packing_digest(plan))
    dist.barrier()
    trainer.say(f"{len(rows)} reference pairs in {path}")
    return path


def run(config: Config, part: int, parts: int) -> None:
    """One rank of one part. Raises ValueError or OSError with a remedy."""
    from conf.check import check
    from pipeline.data import open_data
    from pipeline.distributed import session
    from pipeline.hardware import detect
    from pipeline.model import build_training_model
    from pipeline.trainer import Trainer

    if config.stage.objective != "dpo":
        raise ValueError(
            f"{config.stage.name} minimises {config.stage.objective}, which needs no reference; "
            "give the configuration of a preference stage"
        )
    check(config, detect())
    stage_dir = Path(config.runs_dir) / config.run / config.stage.name
    with session(config.parallel, config.stage.seed) as ranks:
        trainer = Trainer(
            config, ranks, open_data(config, ranks), build_training_model(config), stage_dir
        )
        trainer.check_predecessor()
        write_part(trainer, part, parts)


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="resolved YAML of one stage")
    parser.add_argument("--part", required=True, type=int, help="from 0")
    parser.add_argument("--parts", required=True, type=int)
    arguments = parser.parse_args()
    from conf.compose import load

    try:
        if not 0 <= arguments.part < arguments.parts:
            raise ValueError(f"--part {arguments.part} is not in 0..{arguments.parts - 1}")
        run(load(arguments.config), arguments.part, arguments.parts)
    except (ValueError, OSError) as error:
        sys.stdout.flush()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
