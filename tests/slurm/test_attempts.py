"""The history of a stage's starts, and when it is time to give up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import attempts
from slurm.attempts import Attempt, stuck


def attempt(number: int, outcome: str = "failed", step: int = 0, reached: int = 0) -> Attempt:
    start = Attempt(f"7-0-{number}", "001", started=100.0 * number, step=step, job_id="7", gpus=8)
    return replace(start, ended=100.0 * number + 60, outcome=outcome, reached=reached, code=1)


def test_two_failures_without_a_step_are_enough() -> None:
    assert not stuck([attempt(1)])
    assert stuck([attempt(1), attempt(2)])
    assert stuck([attempt(1, step=5, reached=5), attempt(2, step=5, reached=5)])


def test_a_new_step_ends_the_count() -> None:
    assert not stuck([attempt(1), attempt(2, reached=3)])
    assert not stuck([attempt(1), attempt(2, reached=3), attempt(3, step=3, reached=3)])
    assert not stuck([attempt(1), attempt(2, "killed", reached=3), attempt(3, step=3, reached=3)])


@pytest.mark.parametrize("outcome", ["killed", "stopped", "bad_node"])
def test_what_is_not_the_runs_fault_is_passed_over(outcome: str) -> None:
    assert not stuck([attempt(1), attempt(2, outcome)])
    assert not stuck([attempt(1, outcome), attempt(2, outcome), attempt(3)])
    assert stuck([attempt(1), attempt(2, outcome), attempt(3)])


def test_whoever_goes_on_after_giving_up_gets_two_more() -> None:
    gave_up = replace(attempt(2), gave_up=True)
    assert not stuck([attempt(1), gave_up])
    assert not stuck([attempt(1), gave_up, attempt(3)])
    assert stuck([attempt(1), gave_up, attempt(3), attempt(4)])


def test_records_come_back_as_written(tmp_path: Path) -> None:
    first, second = attempt(1), replace(attempt(2), ended=None, outcome="", code=None)
    first = replace(first, nodes=("acc1", "acc2"), reason="erro: ç", restart=2, log_bytes=9)
    attempts.append_start(tmp_path, first)
    attempts.append_end(tmp_path, first)
    attempts.append_start(tmp_path, second)
    assert attempts.read(tmp_path) == [first, second]
    assert first.gpu_hours(now=0.0) == pytest.approx(8 / 60)
    assert second.gpu_hours(now=second.started + 3600) == pytest.approx(8)
    assert second.gpu_hours(now=second.started - 3600) == 0  # the clock went back


def test_a_line_that_was_cut_loses_only_itself(tmp_path: Path) -> None:
    attempts.append_start(tmp_path, attempt(1))
    path = tmp_path / attempts.ATTEMPTS
    with path.open("a") as file:
        file.write('{"format": 1, "event": "end", "att')
    attempts.append_start(tmp_path, attempt(2))
    assert [found.attempt for found in attempts.read(tmp_path)] == ["7-0-1", "7-0-2"]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "null",
        '{"format": 2, "event": "start"}',
        '{"format": 1, "event": "end", "attempt": "unknown", "ended": 1}',
        '{"format": 1, "event": "start", "attempt": "x", "segment": "1", "started": 1}',
        '{"format": 1, "event": "end", "attempt": "7-0-1", "ended": "soon", "outcome": "failed"}',
        '{"format": 1, "event": "end", "attempt": "7-0-1", "ended": 1, "outcome": "odd"}',
    ],
)
def test_other_lines_are_passed_over(tmp_path: Path, line: str) -> None:
    open_one = replace(attempt(1), ended=None, outcome="", code=None)
    attempts.append_start(tmp_path, open_one)
    with (tmp_path / attempts.ATTEMPTS).open("a") as file:
        file.write(line + "\n")
    assert attempts.read(tmp_path) == [open_one]


def test_steps_reached_remembers_what_metrics_forgot(tmp_path: Path) -> None:
    assert attempts.steps_reached(tmp_path) == 0
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    assert attempts.steps_reached(tmp_path) == 7
    checkpoint = tmp_path / "checkpoints" / "step_00000009"
    checkpoint.mkdir(parents=True)
    assert attempts.steps_reached(tmp_path) == 7  # not complete
    (checkpoint / "MANIFEST.json").touch()
    assert attempts.steps_reached(tmp_path) == 9
    assert attempts.steps_reached(tmp_path, [attempt(1, reached=12)]) == 12
