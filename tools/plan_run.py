"""`make plan`: memory, speed, GPU-hours and disk of each stage, before anything is queued.

    python -m tools.plan_run run=NAME model=amalia_vl_9b data=amalia cluster=mn5 [KEY=VALUE]

Hydra overrides are what-ifs (`parallel=h100_128 precision=fp8 stage2:stage.micro_batch_size=2`).
Words of its own: `stages=[stage2]`, `json=FILE`, `alternatives=8` (rows of the table, 0: none),
`storage=5` (GB/s of a save), and the data's `document= tiles= targets= fill= imbalance= samples=`
(also `stage2:tiles=24`), which docs/planner.md explains.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.schema import Config
from conf.schema.errors import ConfigError
from data_shards.durable import replacing
from slurm.request import parse, prepare
from tools.command import run
from tools.plan.alternatives import nearest_preset, ranked
from tools.plan.predict import Prediction, predict
from tools.plan.report import stage_lines, table, values
from tools.plan.workload import SETTINGS

STAGES = "stages=[stage1,stage2,stage3]"
WORDS = ("json", "alternatives")
NUMBERS = (*SETTINGS, "storage")
ROWS = 8


def main(arguments: list[str]) -> None:
    """Print the plan of every stage."""
    ours, numbers, rest = _sort(arguments)
    if not any(word.partition("=")[0] in ("stage", "stages") for word in rest):
        rest.append(STAGES)
    configs, remarks = prepare(parse([*rest, "dry=true"]))
    rows = _count(ours.get("alternatives", str(ROWS)))
    written: dict[str, Any] = {"format": 1, "stages": []}
    found = {}
    for stage, config in configs.items():
        settings = {**numbers.get("", {}), **numbers.get(stage, {})}
        chosen = found[stage] = predict(config, settings)
        print("\n".join(stage_lines(chosen)))
        others = ranked(config, settings, chosen.row, rows) if rows else []
        entry = values(chosen) | {"alternatives": [values(other) for other in others]}
        entry["nearest_preset"] = _preset(config, settings, chosen)
        if rows:
            print(
                "\n".join(
                    ["  layouts for as many GPUs that fit, fastest first:", *table(others, chosen)]
                )
            )
        print()
        written["stages"].append(entry)
    for remark in remarks:
        print(f"note: {remark}")
    print(_total(found))
    if "json" in ours:
        with replacing(Path(ours["json"])) as file:
            file.write(json.dumps(written, indent=1).encode() + b"\n")


def _preset(config: Config, settings: Mapping[str, float], chosen: Prediction) -> str | None:
    """Name the nearest preset that fits, where the chosen layout does not."""
    if chosen.fit.fits:
        return None
    near = nearest_preset(config, settings, chosen.row)
    if near is None:
        print("  preset   none of conf/parallel fits; use more GPUs, or a table's layout")
        return None
    name, other = near
    print(
        f"  preset   parallel={name} fits: {other.config.parallel.world_size} GPUs, "
        f"{other.fit.share:.0%} of the memory, {other.step.tokens_per_gpu:,.0f} tokens/s/GPU"
    )
    return name


def _total(found: Mapping[str, Prediction]) -> str:
    hours = sum(one.cost.gpu_hours for one in found.values())
    cluster = next(iter(found.values())).config.cluster
    cost = ""
    if cluster.site.cost_unit != "GPU-hours":
        cost = f" = {hours * cluster.site.cost_per_gpu_hour:,.0f} {cluster.site.cost_unit}"
    words = " ".join(
        f"{stage}:stage.gpu_hours={one.cost.submit_gpu_hours:.4g}" for stage, one in found.items()
    )
    bad = [stage for stage, one in found.items() if not one.fit.fits]
    warning = f"\n{', '.join(bad)}: does not fit the GPU's memory" if bad else ""
    return f"{hours:,.0f} GPU-hours in all{cost}; to submit with: {words}{warning}"


def _sort(
    arguments: Sequence[str],
) -> tuple[dict[str, str], dict[str, dict[str, float]], list[str]]:
    """(our words, numbers by stage ("" for all), the rest)."""
    ours: dict[str, str] = {}
    numbers: dict[str, dict[str, float]] = {}
    rest: list[str] = []
    for word in arguments:
        key, equals, value = word.partition("=")
        stage, colon, name = key.rpartition(":")
        if equals and key in WORDS:
            ours[key] = value
        elif equals and name in NUMBERS:
            numbers.setdefault(stage if colon else "", {})[name] = _number(word, value)
        else:
            rest.append(word)
    return ours, numbers, rest


def _number(word: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(f"{word}: {value!r} is not a number") from error


def _count(value: str) -> int:
    if not value.isdigit():
        raise ConfigError(f"alternatives={value}: a number of rows is meant, 0 for none")
    return int(value)


if __name__ == "__main__":
    sys.exit(run(main))
