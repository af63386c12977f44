"""The benchmark page: what it says is what the planner predicts now."""

import json
from pathlib import Path

import pytest

from tools.command import run
from tools.plan.published import GOAL, main, summary
from tools.plan.published_later import LATER
from tools.plan.published_rows import ROWS, gpt, gpt_tokens, job_of
from tools.plan.step import step

PAGE = Path(__file__).parents[3] / "docs" / "benchmarks" / "planner.json"


def error(row: object) -> float:
    return step(job_of(row)).tokens_per_gpu / row.tokens_per_gpu - 1  # type: ignore[arg-type, attr-defined]


def test_most_runs_are_within_the_goal() -> None:
    errors = [error(row) for row in ROWS if not row.calibrates]
    assert summary(errors)["within_goal"] >= 20 and summary(errors)["mean_error"] < 0.06
    assert summary([error(row) for row in LATER])["within_goal"] >= 13


def test_the_constant_is_what_its_rows_calibrate() -> None:
    errors = [error(row) for row in ROWS if row.calibrates]
    assert len(errors) == 3 and abs(sum(errors)) / 3 < 0.01


def test_rows_are_distinct_and_name_their_source() -> None:
    rows = [*ROWS, *LATER]
    assert len({row.name for row in rows}) == len(rows)
    assert all("@" in row.source for row in rows)


def test_the_page_is_up_to_date() -> None:
    written = json.loads(PAGE.read_text(encoding="utf-8"))
    now = {row.name: error(row) for row in [*ROWS, *LATER]}
    for entry in [*written["speeds"], *written["later"]]:
        assert entry["error"] == pytest.approx(now.pop(entry["name"]), abs=1e-6), (
            "run python -m tools.plan.published"
        )
    assert not now and written["memory"]


def test_megatrons_count_of_floating_point_operations() -> None:
    # 465.9 TFLOP/s of 7.1 B parameters: 72 L h^2 (1 + s / 6h + V / 12hL) = 45.5 GFLOP a token.
    shape = gpt(4096, 30, 32)
    assert 465.9e12 / gpt_tokens(shape, 465.9) == pytest.approx(45.49e9, rel=0.01)
    layer = 12 * shape.hidden_size**2
    assert shape.layers * layer + 2 * 131072 * 4096 == pytest.approx(7.1e9, rel=0.01)


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    assert run(main, [f"out={tmp_path}", "memory=false"]) == 0
    record = json.loads((tmp_path / "planner.json").read_text())
    assert record["goal"] == GOAL and len(record["amalia"]) == 5
    text = (tmp_path / "planner.md").read_text()
    assert all(row.name in text for row in [*ROWS, *LATER])
    assert run(main, ["rows=3"]) == 1
