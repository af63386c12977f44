"""report.json and report.html of a run: curves, answers, tiles, scores, timings, facts.

    python -m tools.report run=demo [runs_dir=runs]

Reads only what the run directory holds; parts that are not there (a run without evaluation, a
stage not yet trained) are left out. The page is one file that needs nothing else.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.schema import Config
from pipeline.files import write_atomically, write_json
from tools.command import run, split_arguments
from tools.phases import RECORD
from tools.report_speed import speed_facts

STAGES = ("stage1", "stage2", "stage3")
PT_PT = "style"  # kind of the pairs that say the same in pt-PT and in pt-BR
USAGE = "python -m tools.report run=NAME [runs_dir=runs]"


def read_metrics(stage: Path) -> list[dict[str, Any]]:
    """Lines of a stage's metrics.jsonl; a last line cut by a kill is left out."""
    path = stage / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when there is none; ValueError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run again") from None
    return value if isinstance(value, dict) else {}


def stage_config(stage: Path) -> Config | None:
    """The configuration that the launcher wrote, if the stage was started."""
    from conf.compose import load

    path = stage / "config.yaml"
    return load(path) if path.is_file() else None


def stage_facts(stage: Path) -> dict[str, Any]:
    """Figures of one stage for report.json: how it was trained, and how fast."""
    records, config = read_metrics(stage), stage_config(stage)
    if not records or config is None:
        return {}
    parallel, seconds = config.parallel, sum(record["seconds"] for record in records)
    tokens = sum(record["tokens"] for record in records)
    return {
        "steps": records[-1]["step"],
        "objective": config.stage.objective,
        "learning_rates": dict(vars(config.stage.lr)),
        "layout": f"TP {parallel.tensor}, PP {parallel.pipeline}, CP {parallel.context}, "
        f"DP {parallel.data}" + (", sequence parallel" if parallel.sequence_parallel else ""),
        "packs_per_step": config.stage.global_batch_size,
        "tokens_per_pack": config.stage.sequence_length,
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "samples": sum(record["samples"] for record in records),
        "images": sum(record["images"] for record in records),
        "masked": sum(record["masked"] for record in records),
        "tokens": tokens,
        "step_seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds) if seconds else 0,
        "speed": speed_facts(records),
    }


def scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of held_out.json (or of the dev files) under the names of report.json."""
    stages = [stage for stage in STAGES if stage in evaluation]
    if not stages:
        return {}
    match = {stage: evaluation[stage]["exact_match"] for stage in stages}
    found: dict[str, Any] = {
        "exact_match": {stage: match[stage]["all"] for stage in stages},
        "by_kind": {stage: match[stage]["kind"] for stage in stages},
        "by_layout": {stage: match[stage]["layout"] for stage in stages},
        "questions": match[stages[0]]["count"],
        # An upper bound on answering without looking: the commonest answer to each wording.
        "chance": evaluation[stages[0]]["chance"]["majority"],
        "chance_shuffled": evaluation[stages[0]]["chance"]["shuffled"],
    }
    if "no_tiling" in evaluation:
        found["exact_match"]["no_tiling"] = evaluation["no_tiling"]["exact_match"]["all"]
        found["by_kind"]["no_tiling"] = evaluation["no_tiling"]["exact_match"]["kind"]
        found["by_layout"]["no_tiling"] = evaluation["no_tiling"]["exact_match"]["layout"]
        found["no_tiling_stage"] = evaluation["no_tiling"].get("stage", "")
    return found


def preference(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of logp(chosen) > logp(rejected): pt-PT over pt-BR, and every other kind of pair."""
    rates = {
        stage: evaluation[stage]["pairs"]["rate"]
        for stage in STAGES
        if "pairs" in evaluation.get(stage, {})
    }
    kinds = list(dict.fromkeys(kind for found in rates.values() for kind in found))
    found = {kind: {s: rates[s][kind] for s in rates if kind in rates[s]} for kind in kinds}
    return {"pt_pt_rate": found.pop(PT_PT, {}), **{f"{kind}_rate": r for kind, r in found.items()}}


def build_report(directory: Path) -> dict[str, Any]:
    """What report.json holds; see the module's docstring for what may be missing."""
    held_out = read_optional(directory / "evaluation" / "held_out.json")
    dev = {}
    for stage in STAGES:
        result = read_optional(directory / stage / "evaluation" / "dev.json")
        if result:
            dev[stage] = result
    phases = sorted(read_optional(directory / RECORD).items(), key=lambda item: item[1]["number"])
    seconds = {name: round(entry["seconds"], 1) for name, entry in phases}
    report: dict[str, Any] = {"run": directory.name, "format": 1}
    if held_out:
        report["held_out"] = scores(held_out)
        report["preference"] = preference(held_out)
        for stage in STAGES:
            if "trainer" in held_out.get(stage, {}):
                report["hf"] = {**held_out[stage]["trainer"], "stage": stage}
    if dev:
        report["dev"] = {**scores(dev), "preference": preference(dev)}
    facts = {stage: stage_facts(directory / stage) for stage in STAGES}
    report["stages"] = {stage: fact for stage, fact in facts.items() if fact}
    report["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)} if seconds else {}
    report["goals"] = goals(report)
    report["environment"] = environment(directory)
    return report


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the demo is expected to show: name, value, target, met."""
    match = report.get("held_out", {}).get("exact_match", {})
    rate = report.get("preference", {}).get("pt_pt_rate", {})
    hf = report.get("hf", {})
    found: list[dict[str, Any]] = []

    def goal(name: str, value: float | bool | None, target: str, met: bool) -> None:
        if value is not None:
            found.append({"name": name, "value": value, "target": target, "met": met})

    two, three = match.get("stage2", math.nan), match.get("stage3", math.nan)
    none = match.get("no_tiling", math.nan)
    goal("exact match after stage 2", match.get("stage2"), "at least 0.85", two >= 0.85)
    goal(
        "exact match after stage 3",
        match.get("stage3"),
        "not more than 0.02 under stage 2",
        two - three <= 0.02 + 1e-9,
    )
    goal(
        "exact match without tiling",
        match.get("no_tiling"),
        "at least 0.1 under stage 2",
        two - none >= 0.1,
    )
    goal("pt-PT preferred", rate.get("stage3"), "at least 0.95", rate.get("stage3", 0) >= 0.95)
    goal(
        "pt-PT preferred, gain over stage 2",
        rate["stage3"] - rate["stage2"] if {"stage2", "stage3"} <= set(rate) else None,
        "at least 0.1",
        rate.get("stage3", 0) - rate.get("stage2", 1) >= 0.1,
    )
    same = hf.get("same_greedy_answers")
    goal("export answers as the trainer", same, "the same answers", bool(same))
    return found


def goals_text(report: Mapping[str, Any]) -> str:
    """One line a goal, for the terminal."""
    lines = []
    for goal in report["goals"]:
        value = goal["value"]
        shown = f"{value:.3f}" if isinstance(value, float) else str(value).lower()
        word = "met    " if goal["met"] else "NOT MET"
        lines.append(f"  {word} {goal['name']}: {shown} (goal: {goal['target']})")
    return "\n".join(lines)


def environment(directory: Path) -> dict[str, str]:
    """Head of env.txt and the packages that matter, as the launcher recorded them."""
    path = directory / "env.txt"
    if not path.is_file():
        return {}
    wanted = ("megatron-core", "numpy", "pillow", "tokenizers", "torch", "transformers")
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals and name.lower() in wanted:
            found[name.lower()] = version
        elif not equals and " " in line:
            key, _, value = line.partition(" ")
            found[key] = value
    return found


def write_report(directory: Path) -> dict[str, Any]:
    """Write report.json and report.html into a run directory and return the former.

    Raises ValueError when the run has nothing to report, or a file of it is damaged.
    """
    from tools.report_page import render

    if not directory.is_dir():
        raise ValueError(f"{directory} is not a run; name one with run=")
    report = build_report(directory)
    if not report["stages"] and "held_out" not in report:
        raise ValueError(f"{directory} has no finished steps and no scores; train a stage first")
    write_json(directory / "report.json", report)
    write_atomically(directory / "report.html", render(directory, report).encode())
    return report


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("run", "runs_dir"))
    if rest or not ours.get("run"):
        raise ValueError(f"usage: {USAGE}")
    directory = Path(ours.get("runs_dir", "runs")) / ours["run"]
    report = write_report(directory)
    if report["goals"]:
        print(goals_text(report))
    print(f"{directory / 'report.html'} and report.json written")


if __name__ == "__main__":
    sys.exit(run(main))
