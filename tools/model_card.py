"""README.md of an export, filled from what the run has recorded; no claim that it has not.

Stages come from their DONE.json, GPU-hours from attempts.jsonl, scores from `evaluation/`, data
from the manifests that the stages' configurations name. What is missing is left out, and says so.
"""

import json
import time
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
    trained: str
    frozen: str
    gpu_hours: str
    scores: str


@dataclass(frozen=True)
class DataRow:
    """A data set in the card's table."""

    name: str
    stages: str
    samples: int
    licences: str
    languages: str
    varieties: str


def render(
    stage: Path, done: Done, model: ModelConfig, parameters: int, dtype: str, licence: str = ""
) -> str:
    """The card's text."""
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    before = stages_up_to(stage, done)
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
        data=data_rows(before),
    )


def stages_up_to(stage: Path, done: Done) -> list[Path]:
    """The run's finished stages from the first to this one, the import left out."""
    found = []
    for folder in sorted(stage.resolve().parent.glob("stage*")):
        if (folder / DONE).is_file() and 0 < read_done(folder).number <= done.number:
            found.append(folder)
    if done.number and stage.resolve() not in found:
        found.append(stage.resolve())
    return found


def stage_row(folder: Path) -> StageRow:
    """One stage's line."""
    done = read_done(folder)
    hours = sum(attempt.gpu_hours(time.time()) for attempt in read_attempts(folder))
    return StageRow(
        name=done.stage,
        steps=done.step,
        samples=done.samples,
        trained=", ".join(done.trained) or "nothing",
        frozen=", ".join(done.frozen) or "nothing",
        gpu_hours=f"{hours:,.1f}" if hours else "no GPU recorded",
        scores=_scores(folder / "evaluation"),
    )


def _scores(folder: Path) -> str:
    """Scores of each evaluation file, as `tools.evaluate` writes them."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            lines.append(f"{path.stem}: {float(value['exact_match']['all']):.3f}")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "; ".join(lines) or "not evaluated"


def data_rows(stages: list[Path]) -> list[DataRow]:
    """The data sets of all stages, in the order in which they were first used."""
    used: dict[Path, list[str]] = {}
    for folder in stages:
        path = folder / "config.yaml"
        if not path.is_file():
            continue
        config = load(path)
        for name in config.data.mix.get(folder.name, {}):
            used.setdefault(Path(config.data.root) / name, []).append(folder.name)
    rows = []
    for folder, names in used.items():
        try:
            info = read_manifest(folder / "manifest.parquet").info
        except ManifestError:
            continue  # moved away since; the plan's digest is in DONE.json
        rows.append(
            DataRow(
                name=info.name,
                stages=", ".join(names),
                samples=sum(shard.samples for shard in info.shards),
                licences=_shares(info.licences),
                languages=_shares(info.languages),
                varieties=" / ".join(
                    str(info.varieties.get(label, 0)) for label in ("pt-PT", "pt-BR", "undecided")
                ),
            )
        )
    return rows


def _shares(counts: Mapping[str, Any]) -> str:
    """The commonest four labels with their shares, the pipe of tables escaped."""
    total = sum(counts.values()) or 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{label} {count / total:.0%}".replace("|", "\\|") for label, count in ordered[:4]]
    return ", ".join(parts) + (", ..." if len(ordered) > 4 else "")
