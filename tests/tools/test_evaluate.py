"""Scores by hand, and the export against the trainer's own network."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tools.small_backbones import picture
from tests.tools.weights import read_weights, write_weights
from tools import evaluate
from tools.command import run
from tools.hf_answers import ExportedModel, open_image
from tools.questions import Question, chance, exact_match, read_questions

SIZES = ((50, 33), (200, 31), (20, 90), (64, 64), (7, 120))


def question(text: str, answer: str, kind: str = "read", layout: str = "1x1") -> Question:
    return Question(b"", text, answer, kind, layout)


def test_exact_match_by_kind_and_layout() -> None:
    questions = [
        question("a", "um", "read", "1x1"),
        question("a", "dois", "read", "1x2"),
        question("b", "três", "sum", "1x2"),
        question("b", "quatro", "sum", "1x2"),
    ]
    found = exact_match(questions, ["um", " dois\n", "tres", "Quatro"])
    assert found["all"] == 0.5 and found["count"] == 4
    assert found["kind"] == {"read": 1.0, "sum": 0.0}
    assert found["layout"] == {"1x1": 1.0, "1x2": 1 / 3}


def test_chance_without_the_picture() -> None:
    questions = [question("a", answer) for answer in ("um", "um", "um", "dois")]
    questions += [question("b", "três")]
    found = chance(questions)
    assert found["majority"] == pytest.approx((3 + 1) / 5)
    # wording a: each of three "um" meets two other "um" among three others; "dois" none
    assert found["shuffled"] == pytest.approx((3 * 2 / 3) / 5)


def write_files(directory: Path) -> tuple[Path, Path]:
    rows = [
        {
            "image": picture(*size),
            "question": f"Que algarismo é o {number}?",
            "answer": "sete",
            "kind": ("read", "sum")[number % 2],
            "layout": "1x1",
        }
        for number, size in enumerate(SIZES)
    ]
    pairs = [
        {"image": row["image"], "question": "Olá?", "chosen": a, "rejected": b, "kind": "style"}
        for row in rows
        for a, b in (("sim", "não senhor"), ("não senhor", "sim"))
    ]
    files = directory / "questions-held_out.parquet", directory / "preferences-held_out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), files[0])
    pq.write_table(pa.Table.from_pylist(pairs), files[1])
    return files


def test_the_export_is_the_trainers_network(run_directory: Path, tmp_path: Path) -> None:
    questions, pairs = write_files(tmp_path)
    arguments = [f"export={run_directory / 'hf'}", f"questions={questions}", f"pairs={pairs}"]
    arguments += [f"trainer={run_directory / 'import'}", f"out={tmp_path / 'eval' / 'out.json'}"]
    assert run(evaluate.main, arguments) == 0
    result = json.loads((tmp_path / "eval/out.json").read_text())
    trainer = result["trainer"]
    assert 0 < trainer["max_abs_logit_diff"] < 1e-4
    assert trainer["same_greedy_answers"] is True
    assert trainer["same_answers"] == trainer["compared_questions"] == len(SIZES)
    assert len(result["answers"]) == len(SIZES)
    # every pair is there both ways round, so exactly one of each two is won
    assert result["pairs"]["rate"] == {"style": 0.5}
    assert result["pairs"]["count"] == {"style": 10}


def test_a_changed_export_is_noticed(run_directory: Path, tmp_path: Path) -> None:
    """The comparison can fail: one weight tensor of the export is altered."""
    questions, _ = write_files(tmp_path)
    shutil.copytree(run_directory / "hf", tmp_path / "hf")
    weights = read_weights(tmp_path / "hf")
    weights["multi_modal_projector.linear_2.bias"] += 0.5
    write_weights(weights, tmp_path / "hf")
    found = evaluate.compare_with_trainer(
        ExportedModel(tmp_path / "hf"), read_questions(questions), run_directory / "import"
    )
    assert found["max_abs_logit_diff"] > 1e-2


def test_tiling_off_sees_other_pictures(run_directory: Path, tmp_path: Path) -> None:
    questions, _ = write_files(tmp_path)
    results = []
    for tiling in ("true", "false"):
        out = tmp_path / f"{tiling}.json"
        arguments = [f"export={run_directory / 'hf'}", f"questions={questions}", f"out={out}"]
        assert run(evaluate.main, [*arguments, f"tiling={tiling}"]) == 0
        results.append(json.loads(out.read_text()))
    assert [result["tiling"] for result in results] == [True, False]
    assert results[0]["answers"] != results[1]["answers"]


def test_questions_are_taken_from_every_kind() -> None:
    questions = [question("a", str(n), "read") for n in range(20)]
    questions += [question("b", "x", "sum"), question("c", "y", "bg")]
    chosen = evaluate.some_of_each(questions, 4)
    assert {q.kind for q in chosen} == {"read", "sum", "bg"} and len(chosen) == 4
    assert chosen == evaluate.some_of_each(questions, 4)


def test_what_cannot_be_read_is_named(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, _ = write_files(tmp_path)
    export = f"export={run_directory / 'hf'}"
    out = f"out={tmp_path / 'out.json'}"
    cases = [
        ([export, out], "questions= is missing"),
        ([export, out, f"questions={tmp_path / 'none.parquet'}"], "none.parquet is missing"),
        ([out, f"questions={questions}", f"export={tmp_path}"], "is no export"),
        ([export, out, f"questions={questions}", "tiling=maybe"], "tiling=maybe"),
        ([export, out, f"questions={questions}", "what=1"], "unknown argument"),
    ]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nonsense")
    cases.append(([export, out, f"questions={tmp_path / 'bad.parquet'}"], "cannot be read"))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "short.parquet")
    cases.append(([export, out, f"questions={tmp_path / 'short.parquet'}"], "no column 'question'"))
    for arguments, message in cases:
        assert run(evaluate.main, arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(picture(30, 30)[:60])
