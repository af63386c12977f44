"""Compose, read and write configurations: Hydra for the choices, the dataclasses for the types.

A value may come from four places, each winning over the one before: the dataclass default, the
YAML file of the chosen option, `conf/demo/` when data=demo, and the command line.  Unknown keys
are refused.

Which options are chosen: the command line's, else for `parallel` and `precision` what the chosen
cluster's file names for the model (`layouts`, `precisions`), else those of conf/config.yaml.
"""

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config
from conf.schema.errors import ConfigError

DIRECTORY = Path(__file__).resolve().parent
GROUPS = ("model", "parallel", "precision", "stage", "data", "cluster", "demo")

ConfigStore.instance().store(name="base_config", node=Config)


def compose(overrides: Sequence[str] = ()) -> Config:
    """Configuration of one stage from `conf/` and `key=value` overrides (Hydra's grammar).

    Raises ConfigError, in one line, on an unknown key or option (naming the nearest that exists), a
    value of the wrong type, or a value that is missing.  Whether it can run is `conf.check`'s part.
    """
    overrides = list(overrides)
    parsed = _check_overrides(overrides)
    try:
        overrides = [*_cluster_choices(parsed), *overrides]
        with initialize_config_dir(config_dir=str(DIRECTORY), version_base="1.3"):
            composed = hydra_compose(config_name="config", overrides=overrides)
        return _typed(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def load(path: str | os.PathLike[str]) -> Config:
    """Read a configuration that `dump` wrote.

    Raises ConfigError naming the file on anything but a complete, well-typed configuration.
    """
    return from_mapping(_read_yaml(Path(path)), str(path))


def from_mapping(values: Any, source: str) -> Config:
    """Typed configuration from nested plain values; `source` names them in errors."""
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{source} does not hold a configuration; write it again with slurm.submit"
        )
    try:
        return _typed(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(values))))
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def to_mapping(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration, the inverse of `from_mapping`."""
    return dataclasses.asdict(config)


def dump(config: Config) -> str:
    """YAML text of a resolved configuration."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=100)


def options(group: str) -> list[str]:
    """Names that `group=` accepts."""
    return sorted(path.stem for path in (DIRECTORY / group).glob("*.yaml"))


def known_keys() -> list[str]:
    """Every dotted key that can be set, in the order of the schema."""
    return list(_keys(Config))


def _typed(composed: Any) -> Config:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; set it as {missing[0]}=VALUE")
    config = OmegaConf.to_object(composed)
    if not isinstance(config, Config):
        raise ConfigError("conf/config.yaml lacks base_config in its defaults; put it first")
    return config


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; slurm.submit writes it") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}); restore it or submit anew") from error


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        yield key
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{key}.")


def _cluster_choices(parsed: Sequence[Override]) -> list[str]:
    """Overrides for `parallel` and `precision` that the cluster's file means for the model."""
    given: dict[str, Any] = {}
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key.split(".")[:2] in (["cluster", "layouts"], ["cluster", "precisions"]):
            group = "parallel" if "layouts" in key else "precision"
            raise ConfigError(
                f"{override.input_line} would come too late to choose {group}; give {group}=OPTION"
            )
        if key in GROUPS and isinstance(value, str):
            given[key] = value
    defaults = _read_yaml(DIRECTORY / "config.yaml")["defaults"]
    chosen = {k: v for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}
    chosen |= given
    layouts, precisions = _layouts(chosen["cluster"])
    meant = {
        "parallel": layouts.get(chosen["model"], {}).get(chosen["stage"]),
        "precision": precisions.get(chosen["model"]),
    }
    for group, option in meant.items():
        if option is not None and option not in options(group):
            raise ConfigError(
                f"conf/cluster/{chosen['cluster']}.yaml names {group} {option!r} for "
                f"{chosen['model']}, which is none of {', '.join(options(group))}"
            )
    return [f"{k}={v}" for k, v in meant.items() if v is not None and k not in given]


def _layouts(
    cluster: str, seen: tuple[str, ...] = ()
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """`layouts` and `precisions` of a cluster's file, over those of the files in its `defaults`.

    Read before Hydra composes, as they decide what it is asked to compose.
    """
    path = DIRECTORY / "cluster" / f"{cluster}.yaml"
    values = _read_yaml(path)
    layouts: dict[str, dict[str, str]] = {}
    precisions: dict[str, str] = {}
    if not isinstance(values, Mapping):
        return layouts, precisions  # Hydra says what is wrong
    below = [entry for entry in values.get("defaults") or () if isinstance(entry, str)]
    for name in below:
        if name in options("cluster") and name not in (cluster, *seen):
            inherited = _layouts(name, (*seen, cluster))
            layouts |= inherited[0]
            precisions |= inherited[1]
    own, own_precisions = values.get("layouts") or {}, values.get("precisions") or {}
    parts = [own, own_precisions, *(own.values() if isinstance(own, Mapping) else ())]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ConfigError(
            f"{path}: layouts holds {{MODEL: {{STAGE: PARALLEL}}}} and precisions "
            "{MODEL: PRECISION}"
        )
    for model, stages in own.items():
        layouts[model] = {**layouts.get(model, {}), **stages}
    return layouts, precisions | own_precisions


def _check_overrides(overrides: Sequence[str]) -> list[Override]:
    """Refuse what Hydra would refuse at more length: unknown keys and unknown options."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{_explain(error)}; overrides read KEY=VALUE") from error
    for override in parsed:
        key = override.key_or_group
        value = override.value()
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line}: one value at a time; sweeps are not known here"
            )
        if key in GROUPS:
            # A dictionary given to a group sets several of its keys; Hydra checks those.
            known = isinstance(value, dict) or value in options(key)
            if not known and not override.is_delete():
                leave_out = "; ~demo leaves it out" if key == "demo" else ""
                raise ConfigError(
                    f"{override.input_line}: {key} is one of {', '.join(options(key))}{leave_out}"
                )
        else:
            _check_key(key)
    return parsed


def _check_key(key: str) -> None:
    """Walk the schema along a dotted key; free-form dictionaries accept any name."""
    schema: Any = Config
    walked: list[str] = []
    for part in key.split("."):
        if dataclasses.is_dataclass(schema):
            hints = typing.get_type_hints(schema)
            if part not in hints:
                raise ConfigError(f"{key} is not a configuration key{_nearest(key)}")
            schema = hints[part]
        elif typing.get_origin(schema) is dict:
            schema = typing.get_args(schema)[1]
        elif schema is Any:
            return
        else:
            raise ConfigError(f"{key} is not a configuration key; {'.'.join(walked)} is a value")
        walked.append(part)


def _nearest(key: str) -> str:
    known = known_keys()
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    near = get_close_matches(key, siblings, 1, 0.6) or same_name[:1]
    near = near or get_close_matches(key, known, 1, 0.4)
    return f"; did you mean {near[0]}?" if near else f"; {siblings[0]} is one" if siblings else ""


def _explain(error: Exception) -> str:
    """One line out of Hydra's and OmegaConf's several."""
    # Hydra wraps the error that says what is wrong.
    wrapped = (error.__cause__, error.__context__)
    cause = next((e for e in wrapped if isinstance(e, OmegaConfBaseException)), error)
    full_key = getattr(cause, "full_key", None)
    text = str(getattr(cause, "msg", None) or cause).strip()
    first = text.splitlines()[0] if text else type(cause).__name__
    if "not in '" in first and full_key:
        return f"{full_key} is not a configuration key{_nearest(full_key)}"
    if "is not in struct" in first and full_key:
        return f"{full_key} does not exist yet; write +{full_key}=VALUE to add it"
    return f"{full_key}: {first}" if full_key and full_key not in first else first
