"""DONE.json: the manifest by which a stage begins from the one before."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig
from pipeline.files import read_json, write_json

DONE = "DONE.json"
_FORMAT = 1


class HandoffError(ValueError):
    """A predecessor that is missing, unfinished or of another kind."""


@dataclass(frozen=True)
class Done:
    """Contents of DONE.json."""

    stage: str  # "import", "stage1", ...
    number: int  # 0 for the import
    checkpoint: str  # relative to the stage directory
    checkpoint_digest: str  # SHA-256 of the checkpoint's MANIFEST.json
    step: int
    model: Mapping[str, Any]  # ModelConfig as a dictionary
    tokenizer_digest: str
    geometry_digest: str
    plan_digest: str = ""
    trained: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0


def write_done(stage_dir: Path, done: Done) -> None:
    """The last write of a stage."""
    write_json(stage_dir / DONE, {"format": _FORMAT, **asdict(done)})


def read_done(stage_dir: Path) -> Done:
    """Parse DONE.json.

    Raises:
        HandoffError: the stage is not finished, or the file is damaged.
    """
    path = stage_dir / DONE
    if not path.is_file():
        raise HandoffError(
            f"{path} is missing: {stage_dir.name} has not finished; run it first, or name a "
            "finished stage directory with init_from=…"
        )
    remedy = f"remove it and run {stage_dir.name} again"
    value = read_json(path, "the hand-off file", remedy)
    try:
        if value.pop("format") != _FORMAT:
            raise HandoffError(f"{path} has another format than {_FORMAT}; {remedy}")
        done = Done(**value)
    except (TypeError, KeyError, AttributeError) as error:
        raise HandoffError(f"{path} is damaged ({error}); {remedy}") from None
    checkpoint = (stage_dir / done.checkpoint).resolve()
    if not checkpoint.is_relative_to(stage_dir.resolve()):
        raise HandoffError(f"{path} names a checkpoint outside its folder: {done.checkpoint}")
    return done


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += _differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key} is {other!r} there and {mine!r} here")
    return found


def check_predecessor(
    done: Done,
    source: Path,
    number: int,
    model: ModelConfig,
    tokenizer_digest: str,
    geometry_digest: str,
) -> None:
    """Refuse a predecessor of another stage, shape, tokenizer or geometry, naming the field.

    Raises:
        HandoffError: listing every difference.
    """
    problems = []
    if done.number != number - 1:
        problems.append(
            f"it is {done.stage!r} (number {done.number}), but stage {number} begins from "
            f"number {number - 1}"
        )
    ours, theirs = asdict(model), dict(done.model)
    ours.pop("name"), theirs.pop("name", None)
    problems += _differences(ours, theirs, "model.")
    if done.geometry_digest != geometry_digest:
        problems.append("its tiling geometry differs (model.pinpoints, model.max_tiles)")
    if done.tokenizer_digest != tokenizer_digest:
        problems.append("its tokenizer differs (data.tokenizer)")
    if problems:
        raise HandoffError(f"{source} cannot start stage {number}: " + "; ".join(problems))
