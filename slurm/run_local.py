"""The chain on this machine: the same jobs as on a cluster, one after the other, here.

What a batch script does around srun is done around the ranks by the same functions, so the run
directory tells the same story.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping

from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import CODE
from slurm import bodies, local, segment
from slurm import plan as plans
from slurm.chain import LiveJobs, absolute, chain, export_directory
from slurm.job import LOG, Job
from slurm.refusals import missing, refuse_queued, refuse_stopped, set_failures_aside
from slurm.request import Request
from slurm.run_directory import RunDirectory


def run(request: Request, run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """Run every stage that is not done. Raises ConfigError, OSError, or JobFailed."""
    refuse_stopped(run, configs)
    refuse_queued(run)
    stages = plans.plan(run, configs)
    to_run = [stage.name for stage in stages if stage.state != "done"]
    lacking = missing(run, configs, to_run)
    if lacking:
        raise ConfigError("; ".join(lacking))
    for line in set_failures_aside(run, to_run):
        print(line)
    run.record({name: configs[name] for name in to_run}, plans.as_json(run, stages))
    for stage in request.stages:
        if stage not in to_run:
            print(f"{stage}: done already ({run.stage(stage) / 'DONE.json'}), skipped")
    for job in chain(run, configs, to_run, LiveJobs(), request.export):
        if job.kind == "segment":
            _run_stage(run, job, configs[job.stage])
        elif job.kind == "verify":
            reason = segment.verify(run.stage(job.stage))
            if reason is not None:
                raise local.JobFailed(f"{job.stage}: {reason}")
        else:
            _export(run, job, configs[job.stage])


def _run_stage(run: RunDirectory, job: Job, config: Config) -> None:
    stage, ranks, stage_dir = job.stage, config.parallel.world_size, run.stage(job.stage)
    again = "goes on" if run.has_begun(stage) else "begins"
    directory = stage_dir / "segments" / job.directory.name
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / LOG
    print(f"{stage}: {again} on {ranks} process{'es' if ranks > 1 else ''}, log {log}")
    attempt = {"ATTEMPT_ID": f"local-{os.getpid()}-{time.time_ns()}"}
    if segment.begin(stage_dir, directory, attempt):
        raise local.JobFailed(f"{stage} was not started, for the reason above")
    failure = None
    try:
        environment = {**_environment(run), **_limit(config), **attempt}
        local.run(config, run.config_path(stage), directory, environment=environment)
    except local.JobFailed as error:
        failure = local.JobFailed(f"{stage}: {error}", error.code)
    code = failure.code if failure is not None else 0
    segment.end(stage_dir, directory, code, environment=attempt, restarts=0)
    if failure is not None:
        raise failure
    if not run.is_done(stage):
        raise local.JobFailed(
            f"{stage}: stopped before its last step; the same command goes on from the last "
            f"checkpoint (log: {log})"
        )
    print(f"{stage}: done, {stage_dir}")


def _export(run: RunDirectory, job: Job, config: Config) -> None:
    job.directory.mkdir(parents=True, exist_ok=True)
    log, out = job.directory / LOG, export_directory(run.root, config)
    print(f"export of {job.stage} to {out}, log {log}")
    sys.stdout.flush()
    words = bodies.export_words(config, run.stage(job.stage), out)
    with log.open("wb") as file:
        code = subprocess.run(
            [sys.executable, "-m", *words],
            env={**os.environ, **local.OFFLINE, **_environment(run)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        raise local.JobFailed(f"export: {local.last_line(log)} (log: {log})")


def _environment(run: RunDirectory) -> dict[str, str]:
    """The run's own copy of the code, as in a batch job."""
    return {"PYTHONPATH": str(absolute(run) / CODE), "PYTHONSAFEPATH": "1"}


def _limit(config: Config) -> dict[str, str]:
    """When the ranks shall save and stop, if `cluster.hours` sets a limit here."""
    cluster = config.cluster
    if cluster.hours == float("inf"):
        return {}
    return {"STOP_AFTER_SECONDS": str(int(cluster.hours * 3600 - cluster.stop_minutes * 60))}


def show(run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """Print what would run, and write nothing."""
    stages = plans.plan(run, configs)
    to_run = [stage.name for stage in stages if stage.state != "done"]
    print(f"run {run.root}: nothing is started or written (dry=true)")
    for stage in stages:
        name, config = stage.name, configs[stage.name]
        if stage.state == "done":
            print(f"{name}: done already, would be skipped")
            continue
        what, amount = ("epochs", stage.epochs) if stage.steps is None else ("steps", stage.steps)
        print(
            f"{name}: would {stage.state}, {amount} {what} of {config.stage.global_batch_size} "
            f"packs of {config.stage.sequence_length} tokens, {config.model.name}, "
            f"{config.parallel.world_size} processes (tensor {config.parallel.tensor}, pipeline "
            f"{config.parallel.pipeline}, context {config.parallel.context}, data "
            f"{config.parallel.data})"
        )
        print(f"  {local.describe(config, run.config_path(name))}")
    for reason in missing(run, configs, to_run):
        print(f"not there yet: {reason}")
