"""attempts.jsonl of a stage: every start of its ranks and how it ended.

Two lines an attempt, `start` and `end`. An attempt without its end was killed with its batch shell
(requeue, lost node, walltime) and is closed by the next one. The highest step that the stage ever
reached is kept here, for metrics.jsonl is cut back when a run resumes.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slurm.files import append_line

ATTEMPTS = "attempts.jsonl"
# killed: without an end of its own. bad_node: preflight found one that nobody knew.
OUTCOMES = ("done", "stopped", "failed", "bad_node", "killed")
FRUITLESS = 2  # attempts in a row that may fail without a new step
_FORMAT = 1
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks. Times are seconds since 1970; `ended` is None while it runs."""

    attempt: str  # ATTEMPT_ID
    segment: str  # "001"
    started: float
    step: int  # highest step that the stage had reached before
    job_id: str = ""
    restart: int = 0  # SLURM_RESTART_COUNT
    nodes: tuple[str, ...] = ()
    gpus: int = 0  # of all its nodes
    log_bytes: int = 0  # size of the segment's log before
    ended: float | None = None
    outcome: str = ""
    code: int | None = None
    reached: int = 0  # highest step at its end
    reason: str = ""
    gave_up: bool = False  # the stage's FAILED.json was written at its end

    @property
    def progressed(self) -> bool:
        """Whether it made a step that no attempt before had made."""
        return self.reached > self.step

    def seconds(self, now: float) -> float:
        """Wall time so far; 0 where the clock went backwards."""
        return max(0.0, (now if self.ended is None else self.ended) - self.started)

    def gpu_hours(self, now: float) -> float:
        """GPU-hours of its nodes, without Slurm's accounting."""
        return self.seconds(now) / 3600 * self.gpus


_START = (
    "attempt",
    "segment",
    "started",
    "step",
    "job_id",
    "restart",
    "nodes",
    "gpus",
    "log_bytes",
)
_END = ("attempt", "ended", "outcome", "code", "reached", "reason", "gave_up")


def append_start(stage_dir: Path, attempt: Attempt) -> None:
    """Record that ranks are about to start."""
    _append(stage_dir, "start", attempt, _START)


def append_end(stage_dir: Path, attempt: Attempt) -> None:
    """Record how an attempt ended; its `outcome` is one of OUTCOMES."""
    assert attempt.outcome in OUTCOMES and attempt.ended is not None
    _append(stage_dir, "end", attempt, _END)


def read(stage_dir: Path) -> list[Attempt]:
    """All attempts of a stage, oldest first.

    Lines that a kill cut, or that are something else, are passed over: the record is a history,
    not a condition for training.
    """
    try:
        lines = (stage_dir / ATTEMPTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, Attempt] = {}
    for line in lines:
        try:
            value = json.loads(line)
            event = value.pop("event") if value.pop("format") == _FORMAT else ""
            if event == "start":
                attempt = _typed(Attempt(**{**value, "nodes": tuple(value["nodes"])}))
                found[attempt.attempt] = attempt
            elif event == "end" and found[value["attempt"]].ended is None:
                found[value["attempt"]] = _typed(replace(found[value["attempt"]], **value))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return list(found.values())


def stuck(attempts: Iterable[Attempt], limit: int = FRUITLESS) -> bool:
    """Whether the newest `limit` attempts that failed made no new step.

    Attempts that were killed or asked to stop say nothing of the run and are passed over, as is
    one that found a bad node. A new step, or an earlier giving up (whoever went on has looked into
    it), ends the count.
    """
    failures = 0
    for attempt in reversed(list(attempts)):
        if attempt.progressed or attempt.gave_up:
            break
        failures += attempt.outcome == "failed"
    return failures >= limit


def steps_reached(stage_dir: Path, attempts: Sequence[Attempt] = ()) -> int:
    """The highest step ever seen: in metrics.jsonl, as a checkpoint, or in an earlier attempt."""
    steps = [last_step(stage_dir / "metrics.jsonl")]
    for manifest in stage_dir.glob("checkpoints/step_*/MANIFEST.json"):
        number = manifest.parent.name.removeprefix("step_")
        steps.append(int(number) if number.isdigit() else 0)
    return max([*steps, *(max(attempt.step, attempt.reached) for attempt in attempts)])


def last_step(metrics: Path) -> int:
    """`step` of the last whole line of metrics.jsonl; 0 where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:
        return 0
    for line in reversed(tail.splitlines()):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _append(stage_dir: Path, event: str, attempt: Attempt, names: Sequence[str]) -> None:
    values = asdict(attempt)
    chosen = {name: values[name] for name in names}
    line = json.dumps({"format": _FORMAT, "event": event, **chosen}, ensure_ascii=False)
    append_line(stage_dir / ATTEMPTS, line)


def _typed(attempt: Attempt) -> Attempt:
    """ValueError unless the numbers are numbers: whoever adds them up relies on it."""
    numbers: list[Any] = [attempt.started, attempt.step, attempt.restart, attempt.gpus]
    numbers += [attempt.reached, attempt.log_bytes, attempt.ended or 0.0]
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError("a number is none")
    if attempt.outcome and attempt.outcome not in OUTCOMES:
        raise ValueError("an unknown outcome")
    return attempt
