"""The command line of `slurm.submit`, and the configurations that it means."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.check import check
from conf.check_cluster import unnamed
from conf.compose import compose, options
from conf.schema import ClusterConfig, Config
from conf.schema.errors import ConfigError
from slurm import local

USAGE = (
    "usage: python -m slurm.submit stages=[stage1,stage2,stage3] run=NAME [dry=true] "
    "[test_only=true] [yes=true] [export=true] [KEY=VALUE]"
)
WORDS = ("dry", "test_only", "yes", "export")


@dataclass(frozen=True)
class Request:
    """The command line, sorted."""

    stages: tuple[str, ...]
    shared: tuple[str, ...]  # overrides for every stage
    own: Mapping[str, tuple[str, ...]]  # overrides for one stage
    dry: bool = False  # write the scripts and print, start nothing
    test_only: bool = False  # ask Slurm what it would do
    yes: bool = False  # however many GPU-hours
    export: bool = False  # a Hugging Face folder in the end

    def compose(self, stage: str) -> Config:
        return compose([*self.shared, f"stage={stage}", *self.own.get(stage, ())])


def parse(arguments: Sequence[str]) -> Request:
    """Sort the command line; ConfigError on a stage that does not exist, or none."""
    stages: list[str] = []
    words: dict[str, bool] = {}
    shared: list[str] = []
    own: dict[str, tuple[str, ...]] = {}
    known = options("stage")
    for argument in arguments:
        key, _, value = argument.partition("=")
        stage, colon, override = argument.partition(":")
        if key in ("stages", "stage"):
            stages += [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        elif key in WORDS:
            words[key] = boolean(key, value)
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
    return Request(tuple(sorted(set(stages))), tuple(shared), own, **words)


def prepare(request: Request) -> tuple[dict[str, Config], list[str]]:
    """Compose and check every stage; ConfigError names each that cannot run.

    Returns the configurations in order, and remarks on what could not be found out.
    """
    configs = {stage: request.compose(stage) for stage in request.stages}
    remarks = _detect(request, configs)
    # What is wrong, and with which stages: the same mistake is told once.
    reasons: dict[str, list[str]] = {}
    for stage, config in configs.items():
        try:
            check(config, dry=request.dry)
            if config.cluster.executor == "local":
                local.refuse_too_many(config)
        except ConfigError as error:
            reasons.setdefault(str(error), []).append(stage)
    first = next(iter(configs.values()))
    for stage, config in configs.items():
        for name in ("model", "run", "runs_dir", "cluster.executor"):
            if _value(config, name) != _value(first, name):
                problem = f"{name} differs from {request.stages[0]}'s; give it once"
                reasons.setdefault(problem, []).append(stage)
    if reasons:
        raise ConfigError(
            "; ".join(f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items())
        )
    if request.dry:
        remarks += dict.fromkeys(
            reason for config in configs.values() for reason in unnamed(config)
        )
    return configs, remarks


def boolean(key: str, value: str) -> bool:
    """A word of the command line that is true or false."""
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{key}={value} is neither true nor false")


def _detect(request: Request, configs: dict[str, Config]) -> list[str]:
    """Replace clusters that are to be asked of Slurm by what it says, each kind once."""
    found: list[tuple[ClusterConfig, ClusterConfig]] = []
    remarks: list[str] = []
    for stage, config in configs.items():
        if config.cluster.executor != "slurm" or not config.cluster.detect:
            continue
        known = [detected for asked, detected in found if asked == config.cluster]
        if not known:
            try:
                detected = detect(config.cluster)
            except ConfigError as error:
                if not request.dry:
                    raise
                detected = config.cluster
                remarks.append(f"{error}; the scripts are made from the settings alone")
            found.append((config.cluster, detected))
            known = [detected]
        configs[stage] = dataclasses.replace(config, cluster=known[0])
    return remarks


def _value(config: object, dotted: str) -> object:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def detect(cluster: ClusterConfig) -> ClusterConfig:
    """`slurm.detect`, imported only where it is needed."""
    from slurm.detect import detect as ask

    return ask(cluster)
