"""The command line of `slurm.arrays`, and the configuration that it means."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from conf.check import RUN_NAME, check
from conf.check_cluster import refuse_nameless
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.array_tasks import OPTIONS, TASKS, Asked, Task
from slurm.request import boolean

SWITCHES = ("dry", "test_only", "yes")
NUMBERS = ("elements", "throttle", "hours")


@dataclass(frozen=True)
class Request:
    """The command line, sorted."""

    task: str
    arguments: tuple[str, ...]  # as they came
    overrides: tuple[str, ...]
    asked: Asked
    elements: int | None = None
    throttle: int | None = None
    hours: float | None = None
    dry: bool = False
    test_only: bool = False
    yes: bool = False

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", "slurm.arrays", *self.arguments])


def parse(arguments: Sequence[str]) -> Request:
    """Sort the command line. Raises ConfigError on an unknown task or a bad number."""
    task = ""
    switches: dict[str, bool] = {}
    numbers: dict[str, float] = {}
    options: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "task":
            task = value
        elif key in SWITCHES:
            switches[key] = boolean(key, value)
        elif key in NUMBERS:
            numbers[key] = _positive(key, value)
        elif key in OPTIONS:
            options[key] = value
        else:
            overrides.append(argument)
    if task not in TASKS:
        raise ConfigError(f"task={task}: the tasks are {', '.join(TASKS)}")
    for key in options:
        if task not in OPTIONS[key]:
            raise ConfigError(f"{key}= is for task={' or '.join(OPTIONS[key])}, not {task}")
    if TASKS[task].stage and not any(word.startswith("stage=") for word in overrides):
        overrides.append(f"stage={TASKS[task].stage}")
    plain = tuple(word for word in overrides if not _of_cluster(word))
    return Request(
        task=task,
        arguments=tuple(arguments),
        overrides=tuple(overrides),
        asked=Asked(plain, options),
        elements=int(numbers["elements"]) if "elements" in numbers else None,
        throttle=int(numbers["throttle"]) if "throttle" in numbers else None,
        hours=numbers.get("hours"),
        **switches,
    )


def refuse_bad(config: Config, task: Task, dry: bool = False) -> None:
    """Of a task without the model's ranks, only what it reads."""
    if task.ranks:
        check(config, dry=dry)
        return
    refuse_nameless(config, dry)
    if not RUN_NAME.fullmatch(config.run):
        raise ConfigError(
            f"run={config.run!r} is not a plain directory name; use letters, digits, '.', '_', '-'"
        )
    config.data.check()
    config.cluster.check()


def _of_cluster(word: str) -> bool:
    """Whether an override only says where things run."""
    key = word.partition("=")[0].lstrip("+~")
    return key == "cluster" or key.startswith("cluster.")


def _positive(key: str, value: str) -> float:
    try:
        number = float(value) if key == "hours" else int(value)
    except ValueError:
        number = 0
    if not number > 0:
        kind = "number" if key == "hours" else "whole number"
        raise ConfigError(f"{key}={value} is not a positive {kind}")
    return number
