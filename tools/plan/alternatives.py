"""Other layouts for the same stage and GPUs: all that `conf.check` lets pass, ranked."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from conf.check import check
from conf.compose import DIRECTORY, options
from conf.schema import Config, ParallelConfig
from conf.schema.errors import ConfigError
from models.pipeline_layout import chunk_layers
from tools.plan.job import Job, job_of
from tools.plan.memory import fits
from tools.plan.predict import Prediction, predict
from tools.plan.step import step
from tools.plan.workload import Row

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 4, 8)
VIRTUAL = (1, 2, 3)
CONTEXT = (1, 2, 4)


def candidates(config: Config) -> Iterator[Config]:
    """Layouts of as many GPUs that could run, nothing recomputed; not yet whether they fit."""
    parallel = config.parallel
    precisions = [config.precision]
    if config.cluster.fp8 and config.precision.params == "bf16":
        other = "tensorwise" if config.precision.fp8_recipe is None else None
        precisions.append(dataclasses.replace(config.precision, fp8_recipe=other))
    for tensor, pipeline, virtual, context in itertools.product(TENSOR, PIPELINE, VIRTUAL, CONTEXT):
        ranks = tensor * pipeline * context
        if parallel.world_size % ranks or tensor > max(1, config.cluster.gpus_per_node):
            continue
        # Virtual stages where they divide the layers; else their parts wait for each other.
        if virtual > 1 and (pipeline == 1 or config.model.text.layers % (pipeline * virtual)):
            continue
        layout = dataclasses.replace(
            parallel,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=virtual,
            context=context,
            sequence_parallel=tensor > 1,
            pipeline_layers=None,
            recompute="none",
            recompute_layers=None,
        )
        for precision, packs in itertools.product(precisions, (1, 2)):
            yield dataclasses.replace(
                config,
                parallel=layout,
                precision=precision,
                stage=dataclasses.replace(config.stage, micro_batch_size=packs),
            )


def recomputing(job: Job) -> list[ParallelConfig]:
    """How little recomputation lets the stage fit: nothing; else the MLPs, if that is enough, and
    the fewest whole layers."""
    if fits(job):
        return [job.parallel]
    full = dataclasses.replace(job.parallel, recompute="full")
    if not fits(dataclasses.replace(job, parallel=full)):
        return []
    found = []
    mlp = dataclasses.replace(job.parallel, recompute="selective", recompute_modules=["mlp"])
    if fits(dataclasses.replace(job, parallel=mlp)):
        found.append(mlp)
    low, high = 1, max(job.layers)
    while low < high:
        middle = (low + high) // 2
        fewer = dataclasses.replace(full, recompute_layers=middle)
        if fits(dataclasses.replace(job, parallel=fewer)):
            high = middle
        else:
            low = middle + 1
    return [*found, dataclasses.replace(full, recompute_layers=high)]


def runs(config: Config) -> bool:
    """Whether `conf.check` has no objection."""
    try:
        check(config, dry=True)
    except ConfigError:
        return False
    return True


def ranked(config: Config, settings: Mapping[str, float], row: Row, most: int) -> list[Prediction]:
    """The fastest layouts that fit and run, best first; at least half keep the precision."""
    found: list[tuple[float, Config, Job]] = []
    splits: dict[tuple[int, int], tuple[int, ...] | None] = {}
    hopeless = None  # layout and precision that do not fit even with one pack at a time
    for candidate in candidates(config):
        parallel = candidate.parallel
        key = parallel.pipeline, parallel.virtual_pipeline
        if key not in splits:
            splits[key] = _split(candidate)
        split, kind = splits[key], (parallel, candidate.precision)
        if split is None or kind == hopeless:
            continue
        job = job_of(candidate, row, split)
        # Memory refuses most, and is quickly known.
        layouts = recomputing(job) if job.micro_batches else []
        if not layouts:
            hopeless = kind
        for layout in layouts:
            fitting = dataclasses.replace(candidate, parallel=layout)
            if runs(fitting):
                job = dataclasses.replace(job, parallel=layout)
                found.append((step(job).tokens_per_gpu, fitting, job))
    found.sort(key=lambda entry: -entry[0])
    same = [entry for entry in found if entry[1].precision == config.precision]
    kept = same[: (most + 1) // 2]
    others = [entry for entry in found if not any(entry is keeper for keeper in kept)]
    best = sorted([*kept, *others[: most - len(kept)]], key=lambda entry: -entry[0])
    return [predict(fitting, settings, row, job) for _, fitting, job in best]


def _split(config: Config) -> tuple[int, ...] | None:
    try:
        return tuple(chunk_layers(config.model, config.parallel))
    except ConfigError:
        return None  # more chunks than layers


def preset(name: str) -> ParallelConfig:
    """One choice of conf/parallel, without Hydra."""
    return ParallelConfig(**_values(DIRECTORY / "parallel" / f"{name}.yaml"))


def _values(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for entry in values.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            merged |= _values(path.with_name(f"{entry}.yaml"))
    return merged | values


def nearest_preset(
    config: Config, settings: Mapping[str, float], row: Row
) -> tuple[str, Prediction] | None:
    """The choice of conf/parallel that runs and fits: nearest in GPUs, the cluster's own before
    others', then fastest."""
    own = config.cluster.layouts.get(config.model.name, {}).values()
    found = []
    for name in options("parallel"):
        candidate = dataclasses.replace(config, parallel=preset(name))
        if not runs(candidate):
            continue
        prediction = predict(candidate, settings, row)
        if prediction.fit.fits:
            distance = abs(candidate.parallel.world_size - config.parallel.world_size)
            speed = prediction.step.tokens_per_gpu
            found.append((distance, name not in own, -speed, name, prediction))
    if not found:
        return None
    best = min(found, key=lambda entry: entry[:4])
    return best[3], best[4]
