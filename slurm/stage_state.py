"""What the files of one stage say: steps, loss, speed, checkpoints, failures. No Slurm is asked."""

import json
import math
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slurm import attempts as history
from slurm.attempts import Attempt
from slurm.log_cause import cause
from slurm.verify import DONE, FAILED, STOP

LAST_STEPS = 50  # whose median time and tokens count
TRIGGERS = ("SAVE", "EXIT", STOP)
_TAIL_BYTES = 1 << 16
# Of pipeline.callbacks.progress, behind srun's label.
_PROGRESS = re.compile(rb"\] step (\d+)/(\d+) ")


@dataclass(frozen=True)
class StageState:
    """One stage, from its folder. Times are seconds since 1970; None: not known."""

    name: str
    is_done: bool = False
    step: int = 0  # of the newest weights: trained, and perhaps not saved yet
    steps: int | None = None  # of the whole stage
    loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None  # median
    tflops_per_gpu: float | None = None  # model FLOPs a second, and their share of the GPU's peak
    mfu: float | None = None
    saved_step: int | None = None
    saved_at: float | None = None
    last_sign: float | None = None  # when a step was last recorded
    failure: str = ""  # the reason in FAILED.json
    last_error: str = ""  # of the newest attempt, where it failed
    log: str = ""  # of the newest segment
    triggers: tuple[str, ...] = ()  # files that ask for something and are there
    attempts: tuple[Attempt, ...] = field(default=(), repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)  # its config.yaml

    @property
    def has_begun(self) -> bool:
        return bool(self.step or self.attempts or self.saved_step is not None)


def read(stage_dir: Path) -> StageState:
    """The stage in `stage_dir`. Damaged files count as missing: this only informs."""
    settings = _settings(stage_dir)
    metrics = stage_dir / "metrics.jsonl"
    lines = _metrics(metrics)
    last = lines[-1] if lines else {}
    saved = _newest_checkpoint(stage_dir)
    past = tuple(history.read(stage_dir))
    log = stage_dir / "current.log"
    done = _json(stage_dir / DONE)
    times = [line["seconds"] for line in lines if line["seconds"] > 0]
    seconds = sum(times)
    step = max(int(last.get("step", 0)), saved[0] if saved else 0)
    return StageState(
        name=stage_dir.name,
        is_done=done is not None,
        step=step,
        steps=_steps(settings, done, log),
        loss=_number(last.get("loss")),
        tokens_per_second=sum(line["tokens"] for line in lines) / seconds if seconds else None,
        step_seconds=statistics.median(times) if times else None,
        tflops_per_gpu=_mean(lines, "tflops_per_gpu"),
        mfu=_mean(lines, "mfu"),
        saved_step=saved[0] if saved else None,
        saved_at=saved[1] if saved else None,
        last_sign=_changed(metrics),
        failure=_failure(stage_dir),
        last_error=_last_error(stage_dir, past),
        log=str(log.resolve()) if log.exists() else "",
        triggers=tuple(str(stage_dir / name) for name in TRIGGERS if (stage_dir / name).exists()),
        attempts=past,
        settings=settings,
    )


def ended_at(attempt: Attempt, stage_dir: Path, is_running: bool) -> float:
    """When an attempt ended; of one without an end that runs no more, its last sign of life."""
    if attempt.ended is not None:
        return attempt.ended
    if is_running:
        return max(time.time(), attempt.started)
    log = stage_dir / "segments" / attempt.segment / "log.out"
    return max([attempt.started, *(t for t in (_changed(log),) if t is not None)])


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The last steps of metrics.jsonl; lines cut by a kill are passed over."""
    found = []
    for line in _tail(path).decode(errors="replace").splitlines()[-LAST_STEPS - 1 :]:
        try:
            value = json.loads(line)
            kept = {name: value[name] for name in ("step", "seconds", "tokens")}
            if all(math.isfinite(number) for number in kept.values()):
                kept |= {name: value.get(name) for name in ("loss", "tflops_per_gpu", "mfu")}
                found.append(kept)
        except (ValueError, KeyError, TypeError):
            continue
    return found[-LAST_STEPS:]


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    """Mean over time, of the steps that tell it."""
    told = [(line["seconds"], _number(line[name])) for line in lines if line["seconds"] > 0]
    known = [(seconds, value) for seconds, value in told if value is not None]
    total = sum(seconds for seconds, _ in known)
    return sum(seconds * value for seconds, value in known) / total if total else None


def _steps(settings: Mapping[str, Any], done: Mapping[str, Any] | None, log: Path) -> int | None:
    """Steps of the stage: where it counts epochs, the log knows."""
    stage = settings.get("stage")
    given = stage.get("steps") if isinstance(stage, Mapping) else None
    if isinstance(given, int):
        return given
    if done is not None and isinstance(done.get("step"), int):
        return int(done["step"])
    lines = _PROGRESS.findall(_tail(log))
    return int(lines[-1][1]) if lines else None


def _newest_checkpoint(stage_dir: Path) -> tuple[int, float] | None:
    """(step, time) of the newest checkpoint that is whole."""
    found = []
    for manifest in stage_dir.glob("checkpoints/step_*/MANIFEST.json"):
        step, changed = manifest.parent.name.removeprefix("step_"), _changed(manifest)
        if step.isdigit() and changed is not None:
            found.append((int(step), changed))
    return max(found, default=None)


def _failure(stage_dir: Path) -> str:
    path = stage_dir / FAILED
    if not path.exists():
        return ""
    return str((_json(path) or {}).get("reason") or f"see {path}")


def _last_error(stage_dir: Path, past: tuple[Attempt, ...]) -> str:
    """Why the newest attempt failed; of a local run without attempts, nothing is known."""
    if not past or past[-1].outcome not in ("failed", "bad_node", "killed"):
        return ""
    last = past[-1]
    log = stage_dir / "segments" / last.segment / "log.out"
    reason = last.reason or cause(log, last.log_bytes)
    return reason if last.outcome != "failed" else f"exit code {last.code}: {reason}"


def _settings(stage_dir: Path) -> Mapping[str, Any]:
    """config.yaml as plain values, without the time that Hydra takes."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        value = yaml.load((stage_dir / "config.yaml").read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _number(value: Any) -> float | None:
    """A number as it stands: a loss may be NaN."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
