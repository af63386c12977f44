"""Checkpoints in Megatron's torch_dist format: save, verify, resume, prune.

One folder a checkpoint, `checkpoints/step_NNNNNNNN/`, complete when its MANIFEST.json exists.
Everything in it is sharded by global coordinates, so it loads under any tensor, pipeline, context
and data-parallel layout (`fully_reshardable` in megatron.core.optimizer.distrib_optimizer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from models import extra_state
from models.llava_next import LlavaNext
from models.megatron_version import ASYNC_SAVE
from pipeline.checkpoint_files import (
    CHECKPOINTS,
    commit,
    discard,
    last_line,
    open_aside,
    saved_steps,
    spread_digests,
    step_directory,
)
from pipeline.early_signals import signals_held
from pipeline.manifest import CheckpointError, Manifest, read_manifest, verify_files
from pipeline.optimizer_state import load_optimizer, sharded_optimizer
from pipeline.rng import rng_state, set_rng_state
from pipeline.safe_pickle import check_metadata
from pipeline.write_results import use_shared_file


@dataclass
class TrainingState:
    """Everything that a resumed run needs, and the identity it is checked against."""

    models: Sequence[LlavaNext]  # this rank's chunks of the network
    optimizer: MegatronOptimizer | None
    schedule: OptimizerParamScheduler | None
    layout: dict[str, int]
    plan_digest: str
    config_digest: str
    code_version: str
    step: int = 0
    samples: int = 0

    def sharded(self, loading: bool, with_rng: bool) -> dict[str, Any]:
        """The nested dictionary of sharded tensors that Megatron saves and loads."""
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        # The names inside are the whole network's, so that chunks may be cut otherwise on loading.
        chunks = {
            f"chunk{number}": model.sharded_state_dict(metadata=metadata)
            for number, model in enumerate(self.models)
        }
        for model, chunk in zip(self.models, chunks.values(), strict=True):
            # A predecessor's is never read: it is pickled.
            if self.optimizer is None or not extra_state.is_needed(model.config):
                extra_state.leave_out(chunk)
        state: dict[str, Any] = {"model": chunks}
        if self.optimizer is not None and self.schedule is not None:
            state["optimizer"] = sharded_optimizer(
                self.optimizer, state["model"], loading, metadata
            )
            state["schedule"] = self.schedule.state_dict()
        if with_rng:
            rank, size = dist.get_rank(), dist.get_world_size()
            state["rng"] = ShardedObject("rng", rng_state(), (size,), (rank,), replica_id=0)
        if not loading:  # last: the optimizer finds its parameters by identity
            force_all_tensors_to_non_fp8(state)
        return state

    def manifest(self) -> Manifest:
        """What identifies a checkpoint of this moment; its files are not known yet."""
        return Manifest(
            step=self.step,
            samples=self.samples,
            plan_digest=self.plan_digest,
            config_digest=self.config_digest,
            layout=self.layout,
            code_version=self.code_version,
            files={},
        )


def write_request(state: TrainingState, directory: Path) -> Any:
    """Plan the files of a checkpoint: Megatron's `AsyncRequest`, of which nothing has run yet.

    Rank 0 has written what is not sharded (`common.pt`). All ranks call it.
    """
    use_shared_file()
    return dist_checkpointing.save(
        state.sharded(loading=False, with_rng=True),
        str(directory),
        async_sharded_save=True,
        **ASYNC_SAVE,
    )


def save(state: TrainingState, stage_dir: Path, keep: int) -> Path:
    """Write the checkpoint of `state.step`; all ranks call it. Returns its folder.

    A kill before the last rename leaves a dot-folder that the next save removes.

    Raises:
        OSError: no space, no permission; earlier checkpoints are untouched.
    """
    place = open_aside(stage_dir, state.step)
    try:
        use_shared_file()
        with signals_held():
            dist_checkpointing.save(state.sharded(loading=False, with_rng=True), str(place.aside))
        dist.barrier()
        files = spread_digests(place.aside)
    except (CheckpointException, OSError, RuntimeError) as error:
        discard(place)
        raise place.failure(last_line(error)) from error
    commit(place, replace(state.manifest(), files=files), keep)
    return place.final


def verify(directory: Path) -> Manifest:
    """Check a checkpoint before it is parsed; ranks share the work, all see the outcome.

    Raises:
        CheckpointError: on every rank, naming the first damaged file.
    """
    problem: str | None = None
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(directory)
        names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        verify_files(directory, manifest, names)
        check_metadata(directory)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
    assert manifest is not None
    return manifest


def load_model(models: Sequence[LlavaNext], directory: Path) -> dict[str, Any]:
    """Weights only, from any layout: how a stage begins. Verified first.

    Returns:
        The weights as read, in the form that an optimizer's `reload_model_params` takes: FP8
        models have rounded theirs.
    """
    verify(directory)
    state = TrainingState(models, None, None, {}, "", "", "")
    chunks = _load_into(state, directory, with_rng=False)["model"]
    if len(models) == 1:
        return {"model": chunks["chunk0"]}
    return {f"model{number}": chunks[f"chunk{number}"] for number in range(len(models))}


def load(state: TrainingState, directory: Path, manifest: Manifest) -> None:
    """Everything, into `state`, from a checkpoint that `verify` has passed.

    Raises:
        CheckpointError: the data plan differs, so the position in it means nothing.
    """
    if manifest.plan_digest != state.plan_digest:
        raise CheckpointError(
            f"{directory} was trained on another data plan (data, mix, seed, batch or sequence "
            "length changed); restore the configuration or start a new RUN"
        )
    same_layout = manifest.layout == state.layout
    _load_into(state, directory, with_rng=same_layout)
    state.step, state.samples = manifest.step, manifest.samples


def _load_into(state: TrainingState, directory: Path, with_rng: bool) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            state.sharded(loading=True, with_rng=with_rng), str(directory)
        )
    except (KeyError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{directory} does not fit this model ({reason}); check model=… against the "
            "configuration it was trained with"
        ) from error
    for number, model in enumerate(state.models):
        weights = loaded["model"][f"chunk{number}"]
        extra_state.fill_in(model, weights)
        model.load_state_dict(weights)
    if state.optimizer is not None and state.schedule is not None:
        load_optimizer(state.optimizer, loaded["optimizer"])
        state.schedule.load_state_dict(loaded["schedule"])
    if with_rng:
        rng = loaded["rng"]
        set_rng_state(rng[0] if isinstance(rng, list) else rng)
    return loaded


def newest_good(stage_dir: Path) -> tuple[Path, Manifest, list[str]] | None:
    """The newest checkpoint that verifies, and what was wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints but none is good.
    """
    steps: list[list[int]] = [saved_steps(stage_dir)]
    dist.broadcast_object_list(steps, src=0)
    problems: list[str] = []
    for step in reversed(steps[0]):
        directory = step_directory(stage_dir, step)
        try:
            return directory, verify(directory), problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"no good checkpoint under {stage_dir / CHECKPOINTS}: {problems[0]}; "
            "remove the folder to start the stage over"
        )
    return None
