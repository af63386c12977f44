"""The chain on this machine: the same jobs as on a cluster, one after the other, here."""

import sys
from collections.abc import Mapping

from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import local
from slurm import plan as plans
from slurm.chain import LiveJobs, chain
from slurm.job import Job
from slurm.refusals import missing, refuse_stopped, set_failures_aside
from slurm.request import Request
from slurm.run_directory import RunDirectory


def run(request: Request, run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """Run every stage that is not done. Raises ConfigError, OSError, or JobFailed."""
    refuse_stopped(run, configs)
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
            pass
    sys.stdout.flush()


def _run_stage(run: RunDirectory, job: Job, config: Config) -> None:
    stage, ranks = job.stage, config.parallel.world_size
    again = "goes on" if run.has_begun(stage) else "begins"
    segment = run.new_segment(stage)
    print(f"{stage}: {again} on {ranks} process{'es' if ranks > 1 else ''}, log {segment}/log.out")
    sys.stdout.flush()
    try:
        local.run(config, run.config_path(stage), segment)
    except local.JobFailed as error:
        raise local.JobFailed(f"{stage}: {error}", error.code) from error
    if not run.is_done(stage):
        raise local.JobFailed(
            f"{stage}: stopped before its last step; the same command goes on from the last "
            f"checkpoint (log: {segment / 'log.out'})"
        )
    print(f"{stage}: done, {run.stage(stage)}")


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
