"""Run stages of one run, in order, each only once.

    python -m slurm.submit stages=[stage1,stage2,stage3] run=demo model=tiny data=demo [dry=true]

Everything else is a Hydra override, for every stage; `stage2:parallel=tp2` is for stage 2 only.
All stages are composed and checked before the first one starts.  A stage that has its DONE.json is
skipped, so the same command goes on where the last one ended.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.check import check
from conf.compare import changed
from conf.compose import compose, options
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import local
from slurm.run_directory import RunDirectory

USAGE = (
    "usage: python -m slurm.submit stages=[stage1,stage2,stage3] run=NAME [dry=true] [KEY=VALUE]"
)


@dataclass(frozen=True)
class Request:
    """The command line, sorted."""

    stages: tuple[str, ...]
    dry: bool
    shared: tuple[str, ...]  # overrides for every stage
    own: Mapping[str, tuple[str, ...]]  # overrides for one stage

    def compose(self, stage: str) -> Config:
        return compose([*self.shared, f"stage={stage}", *self.own.get(stage, ())])


def parse(arguments: Sequence[str]) -> Request:
    """Sort the command line; ConfigError on a stage that does not exist, or none."""
    stages: list[str] = []
    dry = False
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = {}
    known = options("stage")
    for argument in arguments:
        key, _, value = argument.partition("=")
        stage, colon, override = argument.partition(":")
        if key in ("stages", "stage"):
            stages += [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        elif key == "dry":
            dry = _boolean(value)
        elif colon and stage in known:
            own[stage] = (*own.get(stage, ()), override)
        else:
            shared.append(argument)
    unknown = sorted(set(stages) - set(known))
    if unknown:
        raise ConfigError(f"stages={','.join(unknown)}: the stages are {', '.join(known)}")
    if not stages:
        raise ConfigError(f"no stages; {USAGE}")
    idle = sorted(set(own) - set(stages))
    if idle:
        raise ConfigError(f"{idle[0]}:{own[idle[0]][0]} is for a stage that stages= does not name")
    return Request(tuple(sorted(set(stages))), dry, tuple(shared), own)


def prepare(request: Request) -> dict[str, Config]:
    """Compose and check every stage; ConfigError names each that cannot run."""
    configs = {stage: request.compose(stage) for stage in request.stages}
    # What is wrong, and with which stages: the same mistake is told once.
    reasons: dict[str, list[str]] = {}
    for stage, config in configs.items():
        try:
            check(config)
            local.refuse_too_many(config)
        except ConfigError as error:
            reasons.setdefault(str(error), []).append(stage)
    first = next(iter(configs.values()))
    for stage, config in configs.items():
        for name in ("model", "run", "runs_dir"):
            if getattr(config, name) != getattr(first, name):
                problem = f"{name} differs from {request.stages[0]}'s; give it once"
                reasons.setdefault(problem, []).append(stage)
    if reasons:
        raise ConfigError(
            "; ".join(f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items())
        )
    return configs


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


def missing(run: RunDirectory, configs: Mapping[str, Config], to_run: Sequence[str]) -> list[str]:
    """What the stages need and is not there: a predecessor, shards, a tokenizer."""
    reasons = []
    for stage in to_run:
        config = configs[stage]
        number = config.stage.number
        before = f"stage{number - 1}" if number > 1 else "import"
        start = Path(config.init_from) if config.init_from else run.stage(before)
        planned = config.init_from is None and before in to_run
        if not planned and not (start / "DONE.json").exists():
            remedy = "run `make import`" if before == "import" else f"run {before} first"
            if config.init_from:
                remedy = "name the directory of a stage that has ended in init_from"
            reasons.append(f"{stage} begins from {start}, which has no DONE.json: {remedy}")
        data = config.data
        for source in data.mix[config.stage.name]:
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


def plan(run: RunDirectory, configs: Mapping[str, Config]) -> dict[str, Any]:
    """What will happen, as plain values: the plan.json of the run."""
    stages = []
    for stage, config in configs.items():
        done, begun = run.is_done(stage), run.has_begun(stage)
        stages.append(
            {
                "name": stage,
                "state": "done" if done else "resume" if begun else "run",
                "config": f"{stage}/config.yaml",
                "ranks": config.parallel.world_size,
                "cluster": config.cluster.name,
                "steps": config.stage.steps,
                "epochs": config.stage.epochs,
                "command": local.command(run.config_path(stage)),
            }
        )
    return {"format": 1, "run": run.root.name, "stages": stages}


def submit(arguments: Sequence[str]) -> None:
    """Do what the command line asks. Raises ConfigError, OSError, or JobFailed."""
    request = parse(arguments)
    configs = prepare(request)
    run = RunDirectory.of(next(iter(configs.values())))
    refuse_changes(run, configs)
    if request.dry:
        _print_dry(run, configs)
        return
    with run.locked():
        planned = plan(run, configs)
        to_run = [stage["name"] for stage in planned["stages"] if stage["state"] != "done"]
        lacking = missing(run, configs, to_run)
        if lacking:
            raise ConfigError("; ".join(lacking))
        run.record({name: configs[name] for name in to_run}, planned)
        for stage in request.stages:
            if stage not in to_run:
                print(f"{stage}: done already ({run.stage(stage) / 'DONE.json'}), skipped")
                continue
            _run_stage(run, stage, configs[stage])


def _run_stage(run: RunDirectory, stage: str, config: Config) -> None:
    ranks = config.parallel.world_size
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


def _print_dry(run: RunDirectory, configs: Mapping[str, Config]) -> None:
    planned = plan(run, configs)
    to_run = [stage["name"] for stage in planned["stages"] if stage["state"] != "done"]
    print(f"run {run.root}: nothing is started or written (dry=true)")
    for stage in planned["stages"]:
        name, config = stage["name"], configs[stage["name"]]
        if stage["state"] == "done":
            print(f"{name}: done already, would be skipped")
            continue
        what, amount = (
            ("steps", stage["steps"]) if stage["steps"] is not None else ("epochs", stage["epochs"])
        )
        print(
            f"{name}: would {stage['state']}, {amount} {what} of {config.stage.global_batch_size} "
            f"packs of {config.stage.sequence_length} tokens, {config.model.name}, "
            f"{config.parallel.world_size} processes (tensor {config.parallel.tensor}, pipeline "
            f"{config.parallel.pipeline}, context {config.parallel.context}, data "
            f"{config.parallel.data})"
        )
        print(f"  {local.describe(config, run.config_path(name))}")
    for reason in missing(run, configs, to_run):
        print(f"not there yet: {reason}")


def _boolean(value: str) -> bool:
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"dry={value} is neither true nor false")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else 2
    try:
        submit(given)
    except local.JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
