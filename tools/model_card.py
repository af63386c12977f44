"""README.md of an export, filled from what the run has recorded; no claim that it has not.

Stages come from their DONE.json, GPU-hours from attempts.jsonl, scores from `evaluation/`, data
from the manifests that the stages' configurations name. What is missing is left out, and says so.
Names and labels come from data of others: on the card they are text, whatever they hold.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from conf.compose import load
from conf.schema import ModelConfig
from data_shards.manifest import ManifestError, read_manifest
from models.anyres import AnyresGeometry
from pipeline.handoff import DONE, Done, read_done
from slurm.attempts import read as read_attempts
from tools.hf_config import TRANSFORMERS


@dataclass(frozen=True)
class StageRow:
    """A stage in the card's table."""

    name: str
    steps: int
    samples: int
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    gpu_hours: str
    scores: tuple[str, ...]  # "name: 0.123"


@dataclass(frozen=True)
class DataRow:
    """A data set in the card's table."""

    name: str
    stages: tuple[str, ...]
    samples: int
    licences: tuple[str, ...]  # "label 12%", the commonest first
    languages: tuple[str, ...]
    varieties: str


def render(
    stage: Path, done: Done, model: ModelConfig, parameters: int, dtype: str, licence: str = ""
) -> str:
    """The card's text."""
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    before = stages_up_to(stage, done)
    data, unread = data_rows(before)
    return environment.from_string(text).render(
        name=model.name,
        stage=done.stage,
        step=done.step,
        parameters=parameters,
        dtype=dtype,
        licence=licence,
        transformers=TRANSFORMERS,
        tile=model.vision.image_size,
        max_tokens=AnyresGeometry.from_model(model).max_tokens(),
        positions=model.text.max_positions,
        stages=[stage_row(folder) for folder in before],
        data=data,
        unread=unread,
    )


def plain(text: object) -> str:
    """`text` in one line of Markdown that shows it and does nothing else, cut to 80 characters.

    Signs that mark something up are escaped, those that turn the line's direction left out.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= 80 else f"{line[:79]}…"
    line = re.sub(r"[\\`*\[\]|~$@]|(?<!\w)_|_(?!\w)|:(?=//)", r"\\\g<0>", line)
    line = re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "\\.", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def stages_up_to(stage: Path, done: Done) -> list[Path]:
    """The run's finished stages from the first to this one, the import left out.

    Of an average it is the stage that it averages, which was trained; other averages are left out.
    """
    found: dict[int, Path] = {}
    for folder in sorted(stage.resolve().parent.glob("stage*")):
        if (folder / DONE).is_file():
            theirs = read_done(folder)
            if 0 < theirs.number <= done.number and theirs.stage == folder.name:
                found[theirs.number] = folder
    if done.number and done.number not in found:
        found[done.number] = stage.resolve()
    return [found[number] for number in sorted(found)]


def stage_row(folder: Path) -> StageRow:
    """One stage's line."""
    done = read_done(folder)
    # A start whose end nobody wrote down ended before the stage did.
    ended = (folder / DONE).stat().st_mtime
    hours = sum(attempt.gpu_hours(ended) for attempt in read_attempts(folder))
    return StageRow(
        name=done.stage,
        steps=done.step,
        samples=done.samples,
        trained=tuple(done.trained) or ("nothing",),
        frozen=tuple(done.frozen) or ("nothing",),
        gpu_hours=f"{hours:,.1f}" if hours else "no GPU recorded",
        scores=_scores(folder / "evaluation"),
    )


def _scores(folder: Path) -> tuple[str, ...]:
    """Scores of each evaluation file, as `tools.evaluate` writes them."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            score = float(value["exact_match"]["all"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if math.isfinite(score):
            lines.append(f"{path.stem}: {score:.3f}")
    return tuple(lines) or ("not evaluated",)


def data_rows(stages: list[Path]) -> tuple[list[DataRow], list[str]]:
    """(data sets of all stages in the order of their first use, names of what cannot be read)."""
    used: dict[Path, list[str]] = {}
    unread = []
    for folder in stages:
        path = folder / "config.yaml"
        try:
            config = load(path)
        except (OSError, ValueError):
            unread.append(f"{folder.name}/{path.name}")
            continue
        for name in config.data.mix.get(folder.name, {}):
            used.setdefault(Path(config.data.root) / name, []).append(folder.name)
    rows = []
    for folder, names in used.items():
        try:
            info = read_manifest(folder / "manifest.parquet").info
        except (ManifestError, OSError):
            unread.append(folder.name)  # moved away since; the plan's digest is in DONE.json
            continue
        rows.append(
            DataRow(
                name=info.name,
                stages=tuple(names),
                samples=sum(shard.samples for shard in info.shards),
                licences=_shares(info.licences),
                languages=_shares(info.languages),
                varieties=" / ".join(
                    str(info.varieties.get(label, 0)) for label in ("pt-PT", "pt-BR", "undecided")
                ),
            )
        )
    return rows, unread


def _shares(counts: Mapping[str, Any]) -> tuple[str, ...]:
    """The commonest four labels with their shares."""
    total = sum(counts.values()) or 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{label[:60]} {count / total:.0%}" for label, count in ordered[:4]]
    return (*parts, "...") if len(ordered) > 4 else tuple(parts)
