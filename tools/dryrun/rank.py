"""One rank of a stage: its true groups, model, optimizer, schedule and checkpoint, without numbers.

Everything that training calls is called, from `pipeline.distributed.session` to
`TrainingState.sharded`; replaced are the process groups (`recording_group`), floating-point tensors
(`shapes_only`) and the reference's log-probabilities. One after the other in one process.
"""

import os
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from conf.schema import Config, StageConfig
from models.cpu_backend import fill_adamw_state
from pipeline.checkpoint import TrainingState
from pipeline.distributed import Ranks, session
from pipeline.model import build_training_model
from pipeline.objectives.base import Objective
from pipeline.objectives.preference import PreferenceObjective, ReferenceObjective
from pipeline.objectives.sft import SupervisedObjective
from pipeline.optimizer import build_optimizer, build_schedule
from pipeline.stages import MODULE_PATTERNS
from pipeline.step import run_schedule, train_step
from tools.dryrun.batches import kinds_of, micro_batch, micro_batch_count
from tools.dryrun.recording_group import Recorder, recording
from tools.dryrun.report import Coordinates, ModulePart, RankReport, Shard
from tools.dryrun.sample import coordinates
from tools.dryrun.shapes_only import ShapesOnly

STEPS = 1000  # of the learning-rate schedule; nothing here depends on it


def simulate(config: Config, rank: int, steps: int = 1) -> RankReport:
    """Build rank `rank` of the layout and take `steps` optimizer steps; an error is reported.

    With `steps=0` only what the rank writes to a checkpoint is looked at.
    """
    started = time.perf_counter()
    report = RankReport(rank, coordinates(config.parallel, rank))
    numbers = ShapesOnly()
    with (
        _as_rank(rank, config.parallel.world_size),
        recording(rank, config.parallel.world_size) as recorder,
    ):
        try:
            with session(config.parallel, config.stage.seed) as ranks, numbers:
                _run(config, ranks, recorder, report, steps)
        except Exception as error:  # whatever it is, it would have stopped the job
            report.error = _told(error, recorder.phase)
    report.groups, report.calls = recorder.groups, recorder.calls
    report.asked, report.seconds = numbers.asked, time.perf_counter() - started
    return report


def _run(config: Config, ranks: Ranks, recorder: Recorder, report: RankReport, steps: int) -> None:
    stage = config.stage
    place = report.coordinates
    found = Coordinates(
        parallel_state.get_tensor_model_parallel_rank(),
        ranks.context,
        ranks.data,
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    assert found == place, f"Megatron puts rank {report.rank} at {found}, not {place}"
    recorder.phase = "model"
    models = build_training_model(config)
    chunks = [model.module for model in models]
    recorder.phase = "optimizer"
    optimizer = build_optimizer(models, stage, config.parallel, config.precision)
    schedule = build_schedule(optimizer, stage, STEPS)
    if steps == 0:
        for one in _inner_optimizers(optimizer):
            if isinstance(getattr(one, "optimizer", None), torch.optim.AdamW):
                fill_adamw_state(one.optimizer)
        report.shards = _checkpoint(models, optimizer, schedule)
        return
    touched = _watch_gradients(chunks)
    report.kinds = kinds_of(ranks.data, ranks.data_size, micro_batch_count(config))
    batches = {kind: micro_batch(config, kind, ranks.first_stage) for kind in set(report.kinds)}
    micro_batches = [batches[kind] for kind in report.kinds]
    if stage.objective == "dpo":
        recorder.phase = "reference"
        for model in models:
            model.eval()
        reference = ReferenceObjective(ranks.context, ranks.context_size)
        with torch.no_grad():
            run_schedule(models, reference, micro_batches, stage, ranks.device, forward_only=True)
        for model in models:
            model.train()
    recorder.phase = "step"
    objective = _objective(stage, ranks)
    for _ in range(steps):
        train_step(models, optimizer, objective, micro_batches, stage, ranks.device)
        schedule.step(1)
    report.modules = _modules(models, optimizer, touched)
    report.bytes = _bytes(models, optimizer)
    recorder.phase = "checkpoint"
    report.shards = _checkpoint(models, optimizer, schedule)
    recorder.phase = "end"


def _checkpoint(
    models: Sequence[Any], optimizer: MegatronOptimizer, schedule: OptimizerParamScheduler
) -> list[Shard]:
    state = TrainingState(
        models=[model.module for model in models],
        optimizer=optimizer,
        schedule=schedule,
        layout={},
        plan_digest="",
        config_digest="",
        code_version="",
    )
    return list(_shards(state.sharded(loading=False, with_rng=True)))


def _objective(stage: StageConfig, ranks: Ranks) -> Objective:
    if stage.objective == "sft":
        return SupervisedObjective(ranks.context, ranks.context_size)
    log_probs: Any = defaultdict(lambda: (0.0, 0.0))
    return PreferenceObjective(stage.preference.beta, log_probs, ranks.context, ranks.context_size)


def _watch_gradients(chunks: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters that a backward pass reaches, filled while it runs."""
    touched: set[int] = set()

    def watch(parameter: nn.Parameter) -> None:
        number = id(parameter)
        parameter.register_hook(lambda _: touched.add(number))

    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                watch(parameter)
    return touched


def _inner_optimizers(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", None) or [optimizer])


def _modules(models: Sequence[Any], optimizer: Any, touched: set[int]) -> dict[str, ModulePart]:
    """What this rank holds of each module, over all its chunks."""
    optimised = {id(p) for one in _inner_optimizers(optimizer) for p in _optimised(one)}
    parts: dict[str, ModulePart] = {}
    for module, patterns in MODULE_PATTERNS.items():
        words = [pattern.strip("*").rstrip(".") for pattern in patterns]
        named = [
            (name, parameter)
            for model in models
            for name, parameter in model.module.named_parameters()
            if any(name == word or name.startswith(f"{word}.") for word in words)
        ]

        def count(keep: Any, named: Any = named) -> int:
            return sum(p.numel() for _, p in named if keep(p))

        parts[module] = ModulePart(
            parameters=count(lambda p: True),
            trainable=count(lambda p: p.requires_grad),
            with_gradient=count(lambda p: getattr(p, "main_grad", None) is not None),
            optimised=count(lambda p: id(p) in optimised),
            untouched=tuple(n for n, p in named if p.requires_grad and id(p) not in touched),
        )
    return parts


def _optimised(optimizer: Any) -> Iterator[Tensor]:
    """Model parameters that one of Megatron's optimizers updates, its replicas' parts included."""
    if isinstance(optimizer, DistributedOptimizer):
        for buffer in getattr(optimizer, "buffers", ()):  # none where nothing is trained
            yield from buffer.params
        return
    groups = [
        *(getattr(optimizer, "float16_groups", None) or ()),
        *(getattr(optimizer, "fp32_from_fp32_groups", None) or ()),
    ]
    if not hasattr(optimizer, "float16_groups") and optimizer.optimizer is not None:
        groups = [group["params"] for group in optimizer.optimizer.param_groups]
    for group in groups:
        yield from group


def _bytes(models: Sequence[Any], optimizer: Any) -> dict[str, int]:
    """Bytes of the storages, each counted once: weights first, then gradients, then the rest."""
    seen: set[int] = set()

    def total(tensors: Iterator[Tensor]) -> int:
        found = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found += storage.nbytes()
        return found

    def buffers() -> Iterator[Any]:
        for model in models:
            yield from model.buffers
            yield from model.expert_parallel_buffers

    def optimizer_tensors() -> Iterator[Tensor]:
        for one in _inner_optimizers(optimizer):
            inner = getattr(one, "optimizer", None)
            for group in inner.param_groups if inner is not None else ():
                yield from group["params"]
            for state in inner.state.values() if inner is not None else ():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    keep = [list(model.parameters()) + list(model.module.buffers()) for model in models]
    return {
        "weights": total(tensor for tensors in keep for tensor in tensors),
        "gradients": total(buffer.grad_data for buffer in buffers()),
        "optimizer": total(optimizer_tensors()),
    }


def _shards(state: dict[str, Any]) -> Iterator[Shard]:
    """The checkpoint's pieces of this rank, as Megatron would write them."""
    apply_factories(state)
    for piece in nested_values(state):
        assert not isinstance(piece, ShardedTensorFactory)
        if isinstance(piece, ShardedTensor):
            skip = piece.prepend_axis_num
            yield Shard(
                piece.key,
                str(piece.dtype).removeprefix("torch."),
                tuple(piece.global_shape),
                tuple(piece.global_offset),
                (1,) * skip + tuple(piece.local_shape),
                is_main_replica(piece.replica_id),
            )
        elif isinstance(piece, ShardedObject):
            yield Shard(
                piece.key,
                "object",
                tuple(piece.global_shape),
                tuple(piece.global_offset),
                (1,) * len(piece.global_shape),
                is_main_replica(piece.replica_id),
            )


def _told(error: Exception, phase: str) -> str:
    """One line: what, in which phase, where in Megatron or this project."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = ("/models/", "/pipeline/", "/megatron/")
    own = [f for f in frames if any(room in f.filename for room in rooms)]
    own = [f for f in own if "cpu_backend" not in f.filename] or list(frames)
    where = " < ".join(
        f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.name}" for f in reversed(own[-2:])
    )
    text = " ".join(str(error).split()) or "no message"
    return f"{phase}: {type(error).__name__}: {text} (at {where})"


@contextmanager
def _as_rank(rank: int, world_size: int) -> Iterator[None]:
    """The environment that a launcher gives, and nothing of it afterwards."""
    given = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in given}
    threads = torch.get_num_threads()
    os.environ.update(given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
