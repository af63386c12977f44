"""Checkpoints in Megatron's torch_dist format: save, verify, resume, prune.

One folder a checkpoint, `checkpoints/step_NNNNNNNN/`, complete when its MANIFEST.json exists.
Everything in it is sharded by global coordinates, so it loads under any tensor, pipeline, context
and data-parallel layout (`fully_reshardable` in megatron.core.optimizer.distrib_optimizer).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from data_shards.durable import sync_directory
from models.llava_next import LlavaNext
from pipeline.early_signals import signals_held
from pipeline.files import digest_and_fsync
from pipeline.manifest import (
    CheckpointError,
    Manifest,
    read_manifest,
    verify_files,
    write_manifest,
)
from pipeline.rng import rng_state, set_rng_state
from pipeline.safe_pickle import check_metadata

CHECKPOINTS = "checkpoints"


def step_directory(stage_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return stage_dir / CHECKPOINTS / f"step_{step:08d}"


def saved_steps(stage_dir: Path) -> list[int]:
    """Steps whose folder carries a manifest, oldest first; nothing is verified yet."""
    found = []
    for directory in (stage_dir / CHECKPOINTS).glob("step_*"):
        if (directory / "MANIFEST.json").is_file() and directory.name[5:].isdigit():
            found.append(int(directory.name[5:]))
    return sorted(found)


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
        state: dict[str, Any] = {"model": chunks}
        if self.optimizer is not None and self.schedule is not None:
            state["optimizer"] = self.optimizer.sharded_state_dict(
                state["model"], is_loading=loading, metadata=metadata
            )
            state["schedule"] = self.schedule.state_dict()
        if with_rng:
            rank, size = dist.get_rank(), dist.get_world_size()
            state["rng"] = ShardedObject("rng", rng_state(), (size,), (rank,), replica_id=0)
        return state


def _spread_digests(directory: Path) -> dict[str, tuple[int, str]]:
    """Digest every file of a new checkpoint, each rank its share, and make them durable."""
    names = sorted(p.name for p in directory.iterdir())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    gathered: list[dict[str, tuple[int, str]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: digest_and_fsync(directory / name) for name in mine})
    return {name: entry for part in gathered if part for name, entry in part.items()}


def save(state: TrainingState, stage_dir: Path, keep: int) -> Path:
    """Write the checkpoint of `state.step`; all ranks call it. Returns its folder.

    A kill before the last rename leaves a dot-folder that the next save removes.

    Raises:
        OSError: no space, no permission; earlier checkpoints are untouched.
    """
    final = step_directory(stage_dir, state.step)
    aside = final.with_name(f".{final.name}.tmp")
    if dist.get_rank() == 0:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".step_*.tmp"):
            shutil.rmtree(leftover)
        aside.mkdir()
    dist.barrier()
    try:
        with signals_held():
            dist_checkpointing.save(state.sharded(loading=False, with_rng=True), str(aside))
        dist.barrier()
        files = _spread_digests(aside)
    except (CheckpointException, OSError, RuntimeError) as error:
        # Megatron's writers run in processes of their own; the cause is in the last line.
        cause = str(error).strip().splitlines()[-1]
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"{final} could not be written ({cause}); make room or give permission and run the "
            "same command: it resumes from the checkpoint before"
        ) from error
    if dist.get_rank() == 0:
        manifest = Manifest(
            step=state.step,
            samples=state.samples,
            plan_digest=state.plan_digest,
            config_digest=state.config_digest,
            layout=state.layout,
            code_version=state.code_version,
            files=files,
        )
        write_manifest(aside, manifest)
        sync_directory(aside)
        if final.exists():  # a damaged checkpoint of the same step that resuming passed over
            shutil.rmtree(final)
        aside.rename(final)
        sync_directory(final.parent)
        prune(stage_dir, keep)
    dist.barrier()
    return final


def prune(stage_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, manifest first."""
    for step in saved_steps(stage_dir)[:-keep]:
        directory = step_directory(stage_dir, step)
        (directory / "MANIFEST.json").unlink()
        shutil.rmtree(directory)


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


def load_model(models: Sequence[LlavaNext], directory: Path) -> Manifest:
    """Weights only, from any layout: how a stage begins. Verified first."""
    manifest = verify(directory)
    state = TrainingState(models, None, None, {}, "", "", "")
    _load_into(state, directory, with_rng=False)
    return manifest


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


def _load_into(state: TrainingState, directory: Path, with_rng: bool) -> None:
    try:
        loaded = dist_checkpointing.load(
            state.sharded(loading=True, with_rng=with_rng), str(directory)
        )
    except (KeyError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{directory} does not fit this model ({reason}); check model=… against the "
            "configuration it was trained with"
        ) from error
    for number, model in enumerate(state.models):
        model.load_state_dict(loaded["model"][f"chunk{number}"])
    if state.optimizer is not None and state.schedule is not None:
        state.optimizer.load_state_dict(loaded["optimizer"])
        state.schedule.load_state_dict(loaded["schedule"])
    if with_rng:
        rng = loaded["rng"]
        set_rng_state(rng[0] if isinstance(rng, list) else rng)


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
