"""`key=value` words of the commands that watch and steer a run, which need no configuration."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from conf.schema.errors import ConfigError

RUNS = "runs"
# As conf.check has it, and no way out of runs_dir.
_NAME = re.compile(r"(?!\.)[^/\x00-\x1f\x7f]+")


def parse(given: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Values by key, `known` holding the defaults. Raises ConfigError on any other word."""
    values = dict(known)
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{word!r} is not understood; give {', '.join(known)} as KEY=VALUE")
        values[key] = value
    return values


def boolean(values: Mapping[str, str], key: str) -> bool:
    """Whether `key` is set. Raises ConfigError where it is neither true nor false."""
    lowered = values[key].strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{key}={values[key]} is neither true nor false")


def number(values: Mapping[str, str], key: str) -> int | None:
    """A whole number, None where nothing is given. Raises ConfigError."""
    text = values[key].strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{key}={text} is not a whole number")
    return int(text)


def run_directory(values: Mapping[str, str]) -> Path:
    """The directory of run=NAME in runs_dir=. ConfigError, naming others, where there is none."""
    name, runs = values["run"], Path(values["runs_dir"])
    if not name:
        raise ConfigError("which run? give run=NAME")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"run={name!r} is not the name of a run")
    root = runs / name
    if root.is_dir():
        return root
    there = run_names(runs)
    near = get_close_matches(name, there, n=3) or there[:5]
    hint = f"; there are {', '.join(near)}" if near else "; give runs_dir= if runs lie elsewhere"
    raise ConfigError(f"{root} does not exist{hint}")


def run_names(runs: Path) -> list[str]:
    """Names of the runs below `runs`, sorted."""
    if not runs.is_dir():
        return []
    marks = ("plan.json", "config.yaml", "stage1", "stage2", "stage3", "import", "arrays")
    return sorted(
        path.name
        for path in runs.iterdir()
        if not path.name.startswith(".") and any((path / mark).exists() for mark in marks)
    )


def check_stage(root: Path, stage: str) -> None:
    """ConfigError unless `stage` is empty or a stage of the run in `root`."""
    there = sorted(path.name for path in root.glob("stage[0-9]*") if path.is_dir())
    if stage and stage not in there:
        raise ConfigError(f"{root} has no {stage}; there are {', '.join(there) or 'no stages yet'}")
