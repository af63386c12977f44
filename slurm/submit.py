"""Run the stages of one run, in order, each only once.

    python -m slurm.submit stages=[stage1,stage2,stage3] run=demo model=tiny data=demo [dry=true]

On cluster=local the stages run here, one after the other. On the others they are queued as a chain
of batch jobs, and the command returns. Everything else is a Hydra override, for every stage;
`stage2:parallel=tp2` is for stage 2 only. All stages are composed and checked before anything
starts. What is done is skipped and what is queued is not queued again, so the same command goes on
where the last one ended.

    dry=true        print the plan; for Slurm clusters write the batch scripts too (needs no Slurm)
    test_only=true  write the scripts and ask `sbatch --test-only` when each would start
    yes=true        do not ask, however many GPU-hours
    export=true     in the end, a Hugging Face folder of the last stage
"""

import sys
from collections.abc import Mapping, Sequence

from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import command_line, commands, queue_state, run_local, sbatch
from slurm import plan as plans
from slurm.answers import QueuedJob
from slurm.chain import LiveJobs, absolute, chain
from slurm.exclude import read as excluded_nodes
from slurm.job import Job, records
from slurm.limits import refuse_over_limits
from slurm.refusals import (
    missing,
    refuse_changes,
    refuse_live_changes,
    refuse_stopped,
    set_failures_aside,
)
from slurm.request import Request, parse, prepare
from slurm.run_directory import RunDirectory


def submit(arguments: Sequence[str]) -> None:
    """Do what the command line asks. Raises ConfigError, OSError, or JobFailed."""
    request = parse(arguments)
    configs, remarks = prepare(request)
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
    first = next(iter(configs.values()))
    run = RunDirectory.of(first)
    refuse_changes(run, configs)
    if first.cluster.executor == "slurm":
        with run.locked():
            (_write_scripts if request.dry else _queue)(request, run, configs)
    elif request.dry or request.test_only:
        run_local.show(run, configs)
    else:
        with run.locked():
            run_local.run(request, run, configs)


def _write_scripts(request: Request, run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """`dry=true`: the scripts and the plan, without asking Slurm anything."""
    stages = plans.plan(run, configs)
    to_run = [stage.name for stage in stages if stage.state != "done"]
    jobs = chain(run, configs, to_run, LiveJobs(), request.export)
    refuse_over_limits(jobs, configs, None)
    _record_if_new(run, configs, to_run, stages)
    for job in jobs:
        sbatch.write_script(job, configs[job.stage], run, "", excluded_nodes(run.root))
    print(f"run {run.root} on {_first(configs).cluster.name}: nothing is queued (dry=true)")
    print(plans.table(stages, _first(configs)))
    for line in plans.job_lines(jobs):
        print(line)
    print(f"{len(jobs)} scripts, below {absolute(run)}:")
    for job in jobs:
        print(f"  {job.script.relative_to(absolute(run))}")
    for reason in missing(run, configs, to_run):
        print(f"not there yet: {reason}")


def _queue(request: Request, run: RunDirectory, configs: Mapping[str, Config]) -> None:
    """Queue what is missing, or with `test_only=true` ask what Slurm would say."""
    queue = queue_state.ask(run)
    live = queue_state.sort(queue.jobs)
    refuse_live_changes(run, configs, queue.jobs, {*live.segments, *live.verifiers})
    refuse_stopped(run, configs)
    stages = plans.plan(run, configs, tuple(live.verifiers))
    to_run = [stage.name for stage in stages if stage.state != "done"]
    new = [stage for stage in to_run if stage not in live.verifiers]
    lacking = missing(run, configs, new, live.verifiers)
    if lacking:
        raise ConfigError("; ".join(lacking))
    jobs = chain(run, configs, to_run, live, request.export)
    refuse_over_limits(jobs, configs, queue.of_user)
    print(f"run {run.root} on {_first(configs).cluster.name}")
    print(plans.table(stages, _first(configs)))
    held = queue_state.held_by_a_cut_submission(run, queue)
    if not jobs and not held:
        print("nothing to queue: " + (_named(queue.jobs) if queue.jobs else "everything is done"))
        return
    exclude = excluded_nodes(run.root)
    if request.test_only:
        _record_if_new(run, configs, new, stages)
        _ask(jobs, run, configs, exclude)
        return
    plans.confirm(stages, _first(configs), request.yes)
    for line in set_failures_aside(run, new):
        print(line)
    _record(run, configs, new, stages)
    queued = sbatch.submit(jobs, configs, run, exclude, held)
    for line in plans.job_lines(jobs, {record.name: record.job_id for record in queued}):
        print(line)
    if held:
        print(f"released {', '.join(held)}, of a submission that was cut short")
    print(f"{len(queued)} jobs queued; they go on by themselves. `make status`, `make cancel`")


def _ask(
    jobs: Sequence[Job], run: RunDirectory, configs: Mapping[str, Config], exclude: Sequence[str]
) -> None:
    """`sbatch --test-only` of every script; ConfigError when one is refused."""
    refused = []
    for job in jobs:
        sbatch.write_script(job, configs[job.stage], run, "", exclude)
        try:
            print(f"  {job.name}: {commands.test_only(job.script)}")
        except ConfigError as error:
            refused.append(f"{job.name}: {error}")
    print("nothing is queued (test_only=true)")
    if refused:
        raise ConfigError("; ".join(refused))


def _record(
    run: RunDirectory,
    configs: Mapping[str, Config],
    names: Sequence[str],
    stages: Sequence[plans.StagePlan],
) -> None:
    run.record({name: configs[name] for name in names}, plans.as_json(run, stages))


def _record_if_new(
    run: RunDirectory,
    configs: Mapping[str, Config],
    names: Sequence[str],
    stages: Sequence[plans.StagePlan],
) -> None:
    """For scripts that are only looked at: what has been submitted or has begun stays as it is."""
    if any(run.has_begun(name) for name in run.recorded()) or any(records(run.root)):
        print(f"note: {run.root} has been submitted before; its settings and code stay as they are")
    else:
        _record(run, configs, names, stages)


def _first(configs: Mapping[str, Config]) -> Config:
    return next(iter(configs.values()))


def _named(live: Mapping[str, QueuedJob]) -> str:
    return ", ".join(f"{job_id} {job.name} is {job.state.lower()}" for job_id, job in live.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(submit, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
