"""Refuse, before anything starts, a configuration that cannot run.

Each rule yields what is wrong and what to change; `check` reports all of them at once.  No torch
here: a submit command checks too, and a job passes in what it found as `Hardware`.
"""

import re
from collections.abc import Callable, Iterator

from conf.alignment import document_multiple, ranks_of_row
from conf.check_cluster import cluster_reasons, unnamed
from conf.check_fp8 import fp8_reasons
from conf.check_memory import memory_reasons
from conf.hardware import Hardware
from conf.schema import Config
from conf.schema.errors import ConfigError, refuse
from models.anyres import AnyresGeometry
from models.pipeline_layout import chunk_layers

# Least room beside the largest image for the chat template, a question and an answer, in tokens.
TEXT_ROOM = 64
LAST_STAGE = 3
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


Rule = Callable[[Config, Hardware | None], Iterator[str]]


def check(config: Config, hardware: Hardware | None = None, dry: bool = False) -> None:
    """Raise ConfigError listing every reason why `config` cannot run and what to change.

    `hardware` is None where the job will run elsewhere; `config.cluster` then answers for it. With
    `dry` the job is only to be looked at: the site's account and QoS may be missing.
    """
    # Without these the other rules would divide by zero.
    reasons = list(_positive(config))
    divisible = not reasons
    if hardware is None and not dry:
        reasons.extend(unnamed(config))
    if divisible:
        parts = (
            config.model,
            config.parallel,
            config.precision,
            config.stage,
            config.data,
            config.cluster,
        )
        for part in parts:
            try:
                part.check()
            except ConfigError as error:
                reasons.append(str(error))
        for rule in RULES:
            reasons.extend(reason for reason in rule(config, hardware) if reason not in reasons)
    refuse(reasons)


def _positive(config: Config) -> Iterator[str]:
    model, stage, parallel = config.model, config.stage, config.parallel
    named = {
        **{f"model.vision.{k}": v for k, v in vars(model.vision).items() if k != "feature_layer"},
        **{f"model.text.{k}": v for k, v in vars(model.text).items() if k != "rope_scaling"},
        **{f"parallel.{k}": getattr(parallel, k) for k in ("world_size", "tensor", "pipeline")},
        "parallel.context": parallel.context,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "stage.sequence_length": stage.sequence_length,
        "stage.global_batch_size": stage.global_batch_size,
        "stage.micro_batch_size": stage.micro_batch_size,
        "stage.document_multiple": stage.document_multiple,
        "stage.log_every": stage.log_every,
        "stage.optimizer.eps": stage.optimizer.eps,
        "stage.optimizer.clip_grad": stage.optimizer.clip_grad,
        "data.shard_bytes": config.data.shard_bytes,
        "data.images.max_pixels": config.data.images.max_pixels,
        "data.build_workers": config.data.build_workers,
        "cluster.threads_per_rank": config.cluster.threads_per_rank,
    }
    for name, value in named.items():
        if not value > 0:
            yield f"{name}={value}: it must be positive"
    for name in ("steps", "epochs", "max_tiles_per_pack"):
        value = getattr(stage, name)
        if value is not None and not value > 0:
            yield f"stage.{name}={value}: it must be positive, or null"


def _tensor(config: Config, _: Hardware | None) -> Iterator[str]:
    """Every matrix that Megatron splits must split evenly."""
    text, vision, tensor = config.model.text, config.model.vision, config.parallel.tensor
    split = {
        "model.text.heads": text.heads,
        "model.text.kv_heads": text.kv_heads,
        "model.text.intermediate_size": text.intermediate_size,
        "model.text.vocab_size": text.vocab_size,
        "model.vision.heads": vision.heads,
        "model.vision.intermediate_size": vision.intermediate_size,
        # The connector's first matrix has as many columns as the decoder is wide.
        "model.text.hidden_size (the connector)": text.hidden_size,
    }
    for name, size in split.items():
        if size % tensor:
            most = max(n for n in range(1, tensor) if all(s % n == 0 for s in split.values()))
            yield (
                f"{name}={size} is not divisible by parallel.tensor={tensor}; "
                f"use parallel.tensor={most} or change the size"
            )


def _pipeline(config: Config, _: Hardware | None) -> Iterator[str]:
    parallel, stage = config.parallel, config.stage
    try:
        chunk_layers(config.model, parallel)
    except ConfigError as error:
        yield str(error)
    except ValueError:  # the model's geometry, which other rules report
        pass
    packs = stage.micro_batch_size * parallel.data
    if parallel.virtual_pipeline == 1 or not packs or stage.global_batch_size % packs:
        return
    # Megatron's interleaved schedule runs micro-batches in groups of as many as there are stages.
    micro_batches = stage.global_batch_size // packs
    if micro_batches % parallel.pipeline:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs a multiple of "
            f"parallel.pipeline={parallel.pipeline} micro-batches in each replica's step, and "
            f"stage.global_batch_size={stage.global_batch_size} gives {micro_batches}; make it a "
            f"multiple of {packs * parallel.pipeline}, or set parallel.virtual_pipeline=1"
        )


def _batch(config: Config, _: Hardware | None) -> Iterator[str]:
    stage, parallel = config.stage, config.parallel
    packs = stage.micro_batch_size * parallel.data
    if packs and stage.global_batch_size % packs:
        yield (
            f"stage.global_batch_size={stage.global_batch_size} is not a multiple of "
            f"stage.micro_batch_size * replicas = {stage.micro_batch_size} * {parallel.data}; "
            f"use a multiple of {packs}"
        )
    documents = document_multiple(parallel)
    if stage.document_multiple % documents:
        yield (
            f"stage.document_multiple={stage.document_multiple} is not a multiple of "
            f"2 * parallel.context = {documents}; set it to one"
        )
    ranks = ranks_of_row(parallel)
    if stage.sequence_length % ranks:
        yield (
            f"stage.sequence_length={stage.sequence_length} is not a multiple of {ranks}, the "
            "ranks that share a sequence (parallel.context, times parallel.tensor with "
            "parallel.sequence_parallel); round it up"
        )


def _overlap(config: Config, _: Hardware | None) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true"


def _image_fits(config: Config, _: Hardware | None) -> Iterator[str]:
    """One pack must hold the largest image with some text; for DPO, once for each answer."""
    stage = config.stage
    try:
        geometry = AnyresGeometry.from_model(config.model)
    except ValueError as error:
        yield str(error)
        return
    image = geometry.max_tokens()
    documents = 2 if stage.objective == "dpo" else 1
    needed = documents * (image + TEXT_ROOM)
    if stage.sequence_length < needed:
        each = " for each of a pair's answers" if documents == 2 else ""
        yield (
            f"stage.sequence_length={stage.sequence_length} is shorter than the largest image "
            f"({image} tokens) and {TEXT_ROOM} tokens of text{each}; use at least {needed}, or "
            "lower model.max_tiles"
        )
    tiles = 1 + max(h * w // geometry.tile**2 for h, w in geometry.pinpoints)
    if stage.max_tiles_per_pack is not None and stage.max_tiles_per_pack < tiles:
        yield (
            f"stage.max_tiles_per_pack={stage.max_tiles_per_pack} is less than the {tiles} tiles "
            "of the largest image; raise it, or lower model.max_tiles"
        )


def _stage(config: Config, _: Hardware | None) -> Iterator[str]:
    stage, optimizer = config.stage, config.stage.optimizer
    if not 1 <= stage.number <= LAST_STAGE:
        yield f"stage.number={stage.number} is none of 1, 2, 3"
    elif stage.name != f"stage{stage.number}":
        yield (
            f"stage.name={stage.name!r} does not go with stage.number={stage.number}; "
            f"name it stage{stage.number}"
        )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"stage.optimizer.{name}={getattr(optimizer, name)} is not in [0, 1)"
    if optimizer.weight_decay < 0:
        yield f"stage.optimizer.weight_decay={optimizer.weight_decay} is negative"
    if stage.seed < 0:
        yield f"stage.seed={stage.seed} is negative"


def _mix(config: Config, _: Hardware | None) -> Iterator[str]:
    """The stage has a mix, whose sources carry the answers that its objective needs."""
    stage, data = config.stage, config.data
    if not data.phases(stage.name):
        yield f"data.mix has no {stage.name}; add +data.mix.{stage.name}={{SOURCE: WEIGHT}}"
        return
    where = f"data.{'curriculum' if stage.name in data.curriculum else 'mix'}.{stage.name}"
    wants_pairs = stage.objective == "dpo"
    for name in data.drawn(stage.name):
        source = data.sources.get(name)
        if source is None or source.preference == wants_pairs:
            continue
        if wants_pairs:
            yield (
                f"stage.objective=dpo needs chosen and rejected answers, which data.sources.{name} "
                f"does not have; take it out of {where}, or set its preference=true"
            )
        else:
            yield (
                f"data.sources.{name} holds preference pairs, which stage.objective=sft cannot "
                f"use; take it out of {where}"
            )


def _head_dim(config: Config, hardware: Hardware | None) -> Iterator[str]:
    text, vision = config.model.text, config.model.vision
    if text.head_dim % 2:
        yield f"model.text.head_dim={text.head_dim} is odd; rotary embeddings need it even"
    on_gpu = hardware.cuda if hardware else config.cluster.gpus_per_node > 0
    sizes = {
        "model.text.head_dim": text.head_dim,
        "model.vision.hidden_size/heads": vision.hidden_size // vision.heads,
    }
    for name, size in sizes.items():
        if on_gpu and (size % 8 or size > 256):
            yield (
                f"{name}={size}: fused attention on a GPU needs a multiple of 8 up to 256; change "
                "the heads"
            )


def _place(config: Config, _: Hardware | None) -> Iterator[str]:
    if not RUN_NAME.fullmatch(config.run):
        yield (
            f"run={config.run!r} is not a plain directory name; use letters, digits, '.', '_', '-'"
        )


def _cluster(config: Config, hardware: Hardware | None) -> Iterator[str]:
    # A job that runs has passed its site's rules, or was started by hand inside an allocation.
    if hardware is None or config.cluster.executor == "local":
        yield from cluster_reasons(config)


RULES: tuple[Rule, ...] = (
    _tensor,
    _pipeline,
    _batch,
    _overlap,
    _image_fits,
    _stage,
    _mix,
    _head_dim,
    fp8_reasons,
    memory_reasons,
    _place,
    _cluster,
)
