"""The jobs of a pipeline, as plain data: segments of each stage, its verifier, the export.

A stage longer than the walltime is several segments, each after the one before, however that
ended; a spare one ends at once when there is nothing left.  The verifier succeeds only when the
stage is done, and what follows depends on it.  Nothing here asks Slurm or writes a file.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import bodies
from slurm.estimate import estimate
from slurm.job import SCRIPT, Job
from slurm.render import shape
from slurm.run_directory import RunDirectory

VERIFY_HOURS = 0.25
EXPORT_HOURS = 2.0
LAST_STAGE = 3
MOST_SEGMENTS = 100  # an estimate beyond it is not meant for this model or machine


@dataclass(frozen=True)
class LiveJobs:
    """Ids of the run's jobs that are queued or running, by what they are."""

    segments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stage -> ids
    verifiers: Mapping[str, str] = field(default_factory=dict)  # stage -> id
    export: str | None = None
    names: Collection[str] = ()  # of all of them


def chain(
    run: RunDirectory,
    configs: Mapping[str, Config],
    to_run: Sequence[str],
    live: LiveJobs,
    export: bool = False,
) -> list[Job]:
    """What has to be queued, in the order of submission.

    Args:
        configs: the stages of the submission, done ones too, in order.
        to_run: those that are not done.  One whose verifier is queued is not queued again.
        export: whether a job makes the Hugging Face folder of the last stage.
    """
    jobs: list[Job] = []
    before = _queued_before(next(iter(configs.values())), live)  # what the next stage waits for
    for stage, config in configs.items():
        if stage not in to_run:
            before = ()
        elif stage in live.verifiers:
            before = (live.verifiers[stage],)
        else:
            segments = _segments(run, stage, config, before, live)
            jobs += segments
            verifier = _verifier(run, stage, config, before, segments, live)
            if _only_one_job(config) and not export and stage == list(configs)[-1]:
                break  # nobody waits for this verifier, and the queue takes a single job
            jobs.append(verifier)
            before = (verifier.name,)
    last = list(configs)[-1]
    if (
        export
        and live.export is None
        and not export_directory(absolute(run), configs[last]).exists()
    ):
        jobs.append(_export(run, last, configs[last], before))
    return jobs


def _queued_before(first: Config, live: LiveJobs) -> tuple[str, ...]:
    """The verifier of the stage before the first one, where an earlier submission queued it."""
    before = f"stage{first.stage.number - 1}"
    if first.init_from is None and before in live.verifiers:
        return (live.verifiers[before],)
    return ()


def export_directory(root: Path, config: Config) -> Path:
    """Where the Hugging Face folder of a stage goes."""
    stage = config.stage
    return root / "hf" if stage.number == LAST_STAGE else root / stage.name / "hf"


def absolute(run: RunDirectory) -> Path:
    """The run directory as a path that holds on every node; links are kept."""
    return Path(os.path.abspath(run.root))


def planned_segments(config: Config, stage_dir: Path) -> tuple[int, int]:
    """Segments that a stage is expected to need, and spare ones."""
    if config.cluster.executor == "local":
        return 1, 0
    expected = estimate(config, stage_dir)
    if expected.segments > MOST_SEGMENTS:
        raise ConfigError(
            f"{config.stage.name} would take {expected.segments} segments of "
            f"{config.cluster.hours:g} h ({expected.hours:,.0f} h {expected.source}), more than "
            f"{MOST_SEGMENTS}: use more ranks or a longer cluster.hours, or set stage.gpu_hours "
            "to what this model takes (null: not known)"
        )
    return expected.segments, config.cluster.spare_segments


def next_number(folder: Path, prefix: str = "", live: Collection[str] = ()) -> int:
    """The next NNN below `folder`, for a job named PREFIX.NNN.

    One that holds a script only was never submitted, unless it is the script of a live job whose
    record was lost.
    """
    taken = [
        int(path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.isdigit() and {entry.name for entry in path.iterdir()} != {SCRIPT}
    ]
    numbers = [name.removeprefix(f"{prefix}.") for name in live if name.startswith(f"{prefix}.")]
    taken += [int(number) for number in numbers if number.isdigit()]
    return max(taken, default=0) + 1


def _segments(
    run: RunDirectory,
    stage: str,
    config: Config,
    before: tuple[str, ...],
    live: LiveJobs,
) -> list[Job]:
    root, name = absolute(run), f"{config.run}.{stage}"
    stage_dir = root / stage
    needed, spare = planned_segments(config, stage_dir)
    nodes, ranks_per_node, cpus = shape(config)
    cluster = config.cluster
    gpus = (
        cluster.gpus_per_node if cluster.exclusive else min(ranks_per_node, cluster.gpus_per_node)
    )
    first = next_number(stage_dir / "segments", name, live.names)
    jobs: list[Job] = []
    previous = queued = live.segments.get(stage, ())
    for number in range(first, first + max(0, needed + spare - len(queued))):
        directory = stage_dir / "segments" / f"{number:03d}"
        job = Job(
            name=f"{name}.{number:03d}",
            kind="segment",
            directory=directory,
            body=bodies.segment(config, stage_dir / "config.yaml", stage_dir, directory),
            hours=cluster.hours,
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            gpus_per_node=gpus,
            cpus_per_rank=cpus,
            exclusive=cluster.exclusive,
            stage=stage,
            number=number,
            # Also of later segments: a first one that is cancelled must not start the second.
            after_ok=before,
            after_any=previous,
            signal_seconds=max(60, int(cluster.stop_minutes * 60)),
        )
        jobs.append(job)
        previous = (job.name,)
    return jobs


def _verifier(
    run: RunDirectory,
    stage: str,
    config: Config,
    before: tuple[str, ...],
    segments: Sequence[Job],
    live: LiveJobs,
) -> Job:
    stage_dir, name = absolute(run) / stage, f"{config.run}.{stage}.verify"
    number = next_number(stage_dir / "verify", name, live.names)
    gpus, cpus = _small(config)
    return Job(
        name=f"{name}.{number:03d}",
        kind="verify",
        directory=stage_dir / "verify" / f"{number:03d}",
        body=bodies.verify(config, stage_dir),
        hours=min(VERIFY_HOURS, config.cluster.hours),
        gpus_per_node=gpus,
        cpus_per_rank=cpus,
        stage=stage,
        number=number,
        after_ok=before,
        after_any=(*live.segments.get(stage, ()), *(job.name for job in segments)),
    )


def _export(run: RunDirectory, stage: str, config: Config, before: tuple[str, ...]) -> Job:
    root, cluster = absolute(run), config.cluster
    number = next_number(root / "export")
    gpus, cpus = _small(config)
    return Job(
        name=f"{config.run}.export.{number:03d}",
        kind="export",
        directory=root / "export" / f"{number:03d}",
        body=bodies.export(config, root / stage, export_directory(root, config)),
        hours=min(EXPORT_HOURS, cluster.hours),
        gpus_per_node=cluster.gpus_per_node if cluster.exclusive else gpus,
        cpus_per_rank=cluster.cpus_per_node if cluster.exclusive else cpus,
        exclusive=cluster.exclusive,  # memory for all the weights
        stage=stage,
        number=number,
        after_ok=before,
    )


def _small(config: Config) -> tuple[int, int | None]:
    """GPUs and cores of a job of one process."""
    cluster = config.cluster
    gpus = cluster.site.single_gpus
    if not gpus:
        return 0, 1
    cores = cluster.cpus_per_node
    return gpus, None if cores is None else max(1, cores * gpus // max(1, cluster.gpus_per_node))


def _only_one_job(config: Config) -> bool:
    queue = config.cluster.queue
    return queue is not None and queue.submitted == 1
