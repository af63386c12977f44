"""Why a submission is refused before anything is started or queued."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from conf.compare import changed, differing
from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import code_digest
from slurm import queue_state, run_directory
from slurm.answers import QueuedJob
from slurm.errors import SlurmError
from slurm.job import records
from slurm.run_directory import RunDirectory
from slurm.sbatch import snapshot_digest
from slurm.verify import FAILED, STOP

# Keys that jobs do not read, and those that Slurm was asked for.
NOT_READ = ("cluster.confirm_gpu_hours", "cluster.exclude", "cluster.spare_segments")
DETECTED = ("cluster.site", "cluster.gpu", "cluster.cpus_per_node", "cluster.memory_gb")


def refuse_changes(run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """ConfigError when a stage that has begun would go on with another recipe."""
    recorded = run.recorded()
    for stage, config in configs.items():
        if stage in recorded and run.has_begun(stage):
            differences = changed(recorded[stage], config)
            if differences:
                raise ConfigError(
                    f"{run.stage(stage)} has begun with other settings: {'; '.join(differences)}; "
                    "give the old values, or choose another run=NAME"
                )


def refuse_live_changes(
    run: RunDirectory,
    configs: Mapping[str, Config],
    live: Mapping[str, QueuedJob],
    stages: Iterable[str],
) -> None:
    """ConfigError when jobs in the queue would find other code or settings than they began with.

    `stages` have jobs in the queue.
    """
    if not live:
        return
    named = f"{len(live)} jobs of {run.root} are queued or running ({_some(live)})"
    remedy = "wait for them, cancel them (`make cancel`), or choose another run=NAME"
    if code_digest(run_directory.REPOSITORY) != snapshot_digest(run):
        raise ConfigError(f"{named} with other code than is here now; {remedy}")
    recorded = run.recorded()
    for stage in stages:
        if stage not in configs or stage not in recorded:
            continue
        passed = NOT_READ + (DETECTED if configs[stage].cluster.detect else ())
        differences = differing(recorded[stage], configs[stage], passed)
        if differences:
            raise ConfigError(
                f"{named} with other settings of {stage}: {'; '.join(differences)}; give the old "
                f"values, or {remedy}"
            )


def refuse_queued(run: RunDirectory) -> None:
    """ConfigError when batch jobs of the run are live, before it is run on this machine."""
    if not any(records(run.root)):
        return
    try:
        live = queue_state.live(run)
    except SlurmError:
        return  # no Slurm here, or none that answers; a job that has been overtaken ends itself
    if live:
        raise ConfigError(
            f"{len(live)} jobs of {run.root} are queued or running ({_some(live)}); cancel them "
            "(`make cancel`), or choose another run=NAME"
        )


def refuse_stopped(run: RunDirectory, stages: Iterable[str]) -> None:
    """ConfigError when somebody has stopped the run or one of the stages with a STOP file."""
    for directory in (run.root, *(run.stage(stage) for stage in stages)):
        if (directory / STOP).exists():
            raise ConfigError(
                f"{directory / STOP} is there: somebody has stopped this run; remove the file to "
                "go on"
            )


def missing(
    run: RunDirectory,
    configs: Mapping[str, Config],
    to_run: Sequence[str],
    queued: Iterable[str] = (),
) -> list[str]:
    """What the stages need and is not there: a predecessor, shards, a tokenizer.

    `queued` are stages whose jobs, and verifier, are in the queue.
    """
    reasons = []
    for stage in to_run:
        config = configs[stage]
        number = config.stage.number
        before = f"stage{number - 1}" if number > 1 else "import"
        start = Path(config.init_from) if config.init_from else run.stage(before)
        planned = config.init_from is None and before in {*to_run, *queued}
        if not planned and not (start / "DONE.json").exists():
            remedy = "run `make import`" if before == "import" else f"run {before} first"
            if config.init_from:
                remedy = "name the directory of a stage that has ended in init_from"
            reasons.append(f"{stage} begins from {start}, which has no DONE.json: {remedy}")
        data = config.data
        for source in data.drawn(config.stage.name):
            if not (Path(data.root) / source).is_dir():
                reasons.append(
                    f"{stage} needs the shards {Path(data.root) / source}: run `make shards`"
                )
        if not Path(data.tokenizer).is_dir():
            reasons.append(
                f"{stage} needs the tokenizer {data.tokenizer}: run `make import`, or set "
                "data.tokenizer"
            )
    return list(dict.fromkeys(reasons))


def set_failures_aside(run: RunDirectory, stages: Iterable[str]) -> list[str]:
    """Rename FAILED.json of stages that are to run again; returns a line for each."""
    lines = []
    for stage in stages:
        path = run.stage(stage) / FAILED
        if path.exists():
            number = 1
            while (aside := path.with_name(f"FAILED-{number}.json")).exists():
                number += 1
            path.rename(aside)
            lines.append(f"{stage}: had failed before, see {aside}; tries again")
    return lines


def _some(live: Mapping[str, QueuedJob], most: int = 4) -> str:
    names = [f"{job_id} {job.name}" for job_id, job in live.items()]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
