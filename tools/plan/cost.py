"""Hours, segments and disk of a stage, from the seconds of its steps."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config
from slurm.estimate import Estimate, estimate
from tools.plan.job import Job
from tools.plan.step import Step
from tools.plan.weights import model_count

STORAGE = 5.0  # GB/s that all ranks together write to a parallel file system; assumed
START = 5 / 60  # hours from a job's start to its first step: imports, checkpoint, first batches
BLOCKING = 0.1  # of a save's time that an asynchronous one holds up training; assumed
# A pass without gradients beside a whole step, for the reference's log-probabilities (stage 3).
FORWARD = 1 / 3
# MANIFEST.json, .metadata, metadata.json, common.pt; and two files of each rank that has something
# to write (megatron's torch_dist strategy writes with two processes).
FEW_FILES = 4
RANK_FILES = 2


@dataclass(frozen=True)
class Disk:
    """Checkpoints of one stage, bytes and files."""

    checkpoint: float
    files: int  # of one checkpoint, at most
    checkpoints: int  # at one time, the one that is being written included

    @property
    def total(self) -> float:
        return self.checkpoint * self.checkpoints


@dataclass(frozen=True)
class Cost:
    """What a whole stage takes."""

    steps: int
    hours: float  # of walltime that the ranks work, starts and saves included
    gpu_hours: float
    submit_gpu_hours: float  # the same for stage.gpu_hours, which counts H100s
    saving_hours: float
    reference_hours: float
    segments: Estimate
    recipe_gpu_hours: float | None  # this cluster's GPUs for what stage.gpu_hours says
    disk: Disk


def disk_of(job: Job, config: Config) -> Disk:
    """Weights of all modules, and what the optimizer keeps of those that train.

    Master weights and moments go into the files as FP32, whatever they are in memory; only an
    optimizer of FP32 weights that is not distributed has no master weights of its own.
    """
    everything, trained = model_count(job)
    states = 12 if job.bytes_per_weight == 2 or job.parallel.distributed_optimizer else 8
    size = job.bytes_per_weight * everything + states * trained
    ranks = config.parallel.model_ranks if not trained else config.parallel.world_size
    keep = config.stage.checkpoint.keep
    return Disk(size, FEW_FILES + RANK_FILES * ranks, keep + 1)


def cost_of(
    config: Config, job: Job, step: Step, steps: int, stage_dir: Path, storage: float = STORAGE
) -> Cost:
    """The stage from its first step to its last.

    Args:
        stage_dir: where the run keeps the stage; what has been measured there counts more.
        storage: GB/s of a save.
    """
    stage, cluster, ranks = config.stage, config.cluster, config.parallel.world_size
    disk = disk_of(job, config)
    each = disk.checkpoint / (storage * 1e9) * (BLOCKING if job.parallel.async_checkpoint else 1)
    saving = (-(-steps // stage.checkpoint.every)) * each / 3600
    reference = steps * step.seconds * FORWARD / 3600 if stage.objective == "dpo" else 0.0
    work = steps * step.seconds / 3600 + saving + reference
    usable = cluster.hours - cluster.stop_minutes / 60
    starts = max(1, -(-int(work * 3600) // max(1, int(min(usable, 1e6) * 3600))))
    hours = work + starts * START
    submit = hours * ranks * cluster.speed
    planned = dataclasses.replace(config, stage=dataclasses.replace(stage, gpu_hours=submit))
    recipe = None
    if stage.gpu_hours is not None:
        recipe = cluster.stage_hours(stage.gpu_hours, ranks) * ranks
    return Cost(
        steps=steps,
        hours=hours,
        gpu_hours=hours * ranks,
        submit_gpu_hours=submit,
        saving_hours=saving,
        reference_hours=reference,
        segments=estimate(planned, stage_dir),
        recipe_gpu_hours=recipe,
        disk=disk,
    )
