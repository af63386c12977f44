"""report.json has what the demo promises; report.html is one file that shows it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.compose import compose, dump
from tests.tools.small_backbones import picture
from tools import report
from tools.command import run
from tools.questions import chance, exact_match, read_questions
from tools.report_charts import Line, bar_chart, line_chart, smooth, ticks
from tools.report_page import data_card
from tools.report_speed import speed_facts

SIZES = ((50, 33), (200, 31), (20, 90), (64, 64))
EVIL = "<script>alert(1)</script>"
SPEED: dict[str, Any] = {
    "tokens_per_second": 200.0,
    "images_per_second": 6.0,
    "tflops_per_gpu": 412.0,
    "mfu": 0.417,
    "effective_tokens": 0.8,
    "imbalance": {"attention": 1.2, "tiles": 1.5, "flops": 1.1},
    "peak_memory_gib": 55.5,
    "seconds_forward": 0.1,
    "seconds_backward": 0.25,
    "seconds_communication": 0.05,
    "seconds_other": 0.1,
}


def write_run(directory: Path, evaluated: bool = True) -> None:
    """A run as the launcher, the trainer and the demo leave it, with made-up figures."""
    for number, stage in enumerate(report.STAGES, start=1):
        folder = directory / stage
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(compose([f"stage={stage}", "parallel=tp2"])))
        lines = []
        for step in range(1, 21):
            record: dict[str, Any] = {"step": step, "loss": 2 / step, "grad_norm": 1.0, "lr": 1e-3}
            counts = {"tokens": 100, "samples": 4, "images": 3, "tiles": 9, "masked": 0}
            record.update(counts, seconds=0.5)
            if number > 1:  # stage 1 is from before these were recorded
                record.update(SPEED)
            if number == 3:
                record.update(accuracy=0.9, chosen_reward=0.1, rejected_reward=-0.2)
            lines.append(json.dumps(record))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 21, "lo')
    (directory / "env.txt").write_text("python 3.11.7\ncommit abc\ntorch==2.13.0\nzzz==1\n")
    phases = {"stage1": (30.04, 1), "data": (2.0, 0), "stage2": (100.0, 2)}
    record = {n: {"seconds": s, "inputs": "", "number": k} for n, (s, k) in phases.items()}
    (directory / "phases.json").write_text(json.dumps(record))
    if evaluated:
        write_scores(directory)


def write_scores(directory: Path) -> None:
    rows = [
        {
            "image": picture(*size),
            "question": "Que algarismos vês?",
            "answer": ("Vejo um.", "Vejo dois.")[n % 2],
            "kind": ("read", "sum")[n // 2],
            "layout": "1x1",
        }
        for n, size in enumerate(SIZES)
    ]
    path = directory / "held_out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    questions = read_questions(path)
    right = [question.answer for question in questions]
    answers = {
        "stage1": ["", EVIL, "Vejo um.", ""],
        "stage2": right,
        "stage3": [*right[:3], "Vejo nove."],
        "no_tiling": ["Vejo um."] * 4,
    }
    scores: dict[str, Any] = {}
    for stage, given in answers.items():
        scores[stage] = {
            "exact_match": exact_match(questions, given),
            "chance": chance(questions),
            "answers": given,
            "questions": str(path),
        }
    for stage, rate in (("stage1", 0.2), ("stage2", 0.25), ("stage3", 1.0)):
        scores[stage]["pairs"] = {"rate": {"style": rate, "truth": 0.9}}
    scores["no_tiling"]["stage"] = "stage2"
    scores["stage3"]["trainer"] = {
        "max_abs_logit_diff": 2e-6,
        "same_greedy_answers": True,
        "same_answers": 4,
        "compared_questions": 4,
    }
    (directory / "evaluation").mkdir()
    (directory / "evaluation" / "held_out.json").write_text(json.dumps(scores))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    write_run(tmp_path / "demo")
    assert run(report.main, ["run=demo", f"runs_dir={tmp_path}"]) == 0
    return tmp_path / "demo"


def test_json_has_the_promised_figures(finished: Path) -> None:
    found = json.loads((finished / "report.json").read_text())
    match = found["held_out"]["exact_match"]
    assert match == {"stage1": 0.25, "stage2": 1.0, "stage3": 0.75, "no_tiling": 0.5}
    assert found["held_out"]["chance"] == 0.5
    assert found["held_out"]["by_kind"]["stage3"] == {"read": 1.0, "sum": 0.5}
    assert found["preference"]["pt_pt_rate"] == {"stage1": 0.2, "stage2": 0.25, "stage3": 1.0}
    assert found["hf"]["max_abs_logit_diff"] == 2e-6
    assert found["hf"]["same_greedy_answers"] is True
    assert found["seconds"] == {"data": 2.0, "stage1": 30.0, "stage2": 100.0, "all": 132.0}
    assert found["stages"]["stage1"]["tokens_per_second"] == 200
    assert found["stages"]["stage1"]["speed"] == {}
    speed = found["stages"]["stage2"]["speed"]
    assert speed["mfu"] == pytest.approx(0.417) and speed["effective_tokens"] == pytest.approx(0.8)
    assert speed["shares"]["backward"] == pytest.approx(0.5)
    assert sum(speed["shares"].values()) == pytest.approx(1)
    assert found["stages"]["stage1"]["steps"] == 20, "the line cut by a kill is left out"
    assert "TP 2" in found["stages"]["stage2"]["layout"]
    assert found["environment"] == {"python": "3.11.7", "commit": "abc", "torch": "2.13.0"}


def test_goals_can_be_met_and_missed(finished: Path) -> None:
    found = json.loads((finished / "report.json").read_text())
    met = {goal["name"]: goal["met"] for goal in found["goals"]}
    assert met == {
        "exact match after stage 2": True,
        "exact match after stage 3": False,  # 0.25 under stage 2
        "exact match without tiling": True,
        "pt-PT preferred": True,
        "pt-PT preferred, gain over stage 2": True,
        "export answers as the trainer": True,
    }
    assert "NOT MET exact match after stage 3: 0.750" in report.goals_text(found)


def test_page_is_self_contained_and_escaped(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    assert "http" not in page and "@import" not in page and "url(#" not in page.split("<svg")[0]
    assert page.count("<svg") >= 9 + 3, "three curves a stage and the scores"
    assert page.count("data:image/png") >= len(SIZES)
    assert "Que algarismos vês?" in page and "Vejo nove." in page
    assert "not met" in page and "abc" in page


def test_the_page_shows_the_speed_of_stages_that_recorded_it(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    section = page.split("<h2>Speed</h2>")[1].split("<h2>")[0]
    assert section.count("<h3>") == 2
    for text in ("412 TFLOP/s", "41.7 %", "80.0 %", "55.5 GiB", "backward 50.0 %"):
        assert text in section
    assert "checkpoint" not in section, "what took no time"


def test_speed_is_totals_over_totals() -> None:
    slow = {**SPEED, "tokens": 100, "seconds": 3.0, "mfu": None, "tokens_per_second": 100 / 3}
    fast = {**SPEED, "tokens": 300, "seconds": 1.0, "tokens_per_second": 300.0}
    fast["effective_tokens"] = 0.5
    old = {"tokens": 10**6, "seconds": 1.0}
    found = speed_facts([slow, fast, old])
    assert found["tokens_per_second"] == pytest.approx(400 / 4)
    assert found["mfu"] == 0.417, "of the steps that tell it"
    assert found["effective_tokens"] == pytest.approx(400 / (125 + 600))
    assert speed_facts([old]) == speed_facts([]) == {}


def test_a_run_without_scores_has_curves(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", evaluated=False)
    assert run(report.main, ["run=plain", f"runs_dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "plain/report.json").read_text())
    assert "held_out" not in found and found["goals"] == []
    assert "DPO loss" in (tmp_path / "plain/report.html").read_text()


def test_what_cannot_be_reported_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "is not a run"), ("empty", "train a stage first")):
        assert run(report.main, [f"run={name}", f"runs_dir={tmp_path}"]) == 1
        assert message in capsys.readouterr().err
    write_run(tmp_path / "bad")
    (tmp_path / "bad/evaluation/held_out.json").write_text("{")
    assert run(report.main, ["run=bad", f"runs_dir={tmp_path}"]) == 1
    assert "held_out.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "bad/report.html").exists()


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0, 600) == [0, 200, 400, 600]
    for low, high in ((0.013, 0.82), (-3.0, 17.0), (5.0, 5.0), (0, 3e-3)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and len(found) < 9


def test_curves_survive_gaps_and_single_points() -> None:
    line = Line("x", [1, 2, 3], [1.0, math.nan, 2.0])
    assert "nan" not in line_chart([line], title="t")
    assert "<polyline" in line_chart([Line("x", [1], [1.0])], title="t")
    assert line_chart([Line("x", [], [])], title="t") == ""
    assert bar_chart({}, title="t") == ""
    assert "&lt;b&gt;" in bar_chart({"<b>": {"s": 0.5}}, title="t")
    assert smooth([1.0, 1.0, 4.0]) == [1.0, 2.0, 2.5]


def test_the_page_links_to_the_card_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)  # where data.root is counted from
    config = report.stage_config(tmp_path / "demo" / "stage1")
    assert config is not None
    root = Path(config.data.root)
    assert data_card(tmp_path / "demo") == ""
    root.mkdir(parents=True, exist_ok=True)
    (root / "card.html").write_text("card")
    link = data_card(tmp_path / "demo")
    assert (tmp_path / "demo" / link).resolve() == (root / "card.html").resolve()
