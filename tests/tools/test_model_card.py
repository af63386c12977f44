"""The card says what the run recorded, no more, and hostile names in it stay text."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from conf.compose import compose, dump
from pipeline.handoff import Done, read_done, write_done
from slurm.attempts import Attempt, append_end, append_start
from tests.data_shards.made_manifest import made_manifest
from tests.tools.small_backbones import OVERRIDES
from tools.hf_export import model_of
from tools.model_card import plain, render

MANIFEST = "manifest.parquet"


def write_stage(root: Path, import_: Done, number: int, mix: dict[str, float]) -> Path:
    """A finished stage: two starts, of which the second's end is not written down."""
    folder = root / f"stage{number}"
    folder.mkdir()
    done = replace(
        import_,
        stage=folder.name,
        number=number,
        step=1000 * number,
        samples=256_000,
        trained=["connector"],
        frozen=["vision tower", "language_model"],
    )
    write_done(folder, done)
    os.utime(folder / "DONE.json", (10_000, 10_000))
    first = Attempt("a", "001", started=1000.0, step=0, gpus=8)
    append_start(folder, first)
    append_end(folder, replace(first, ended=4600.0, outcome="done", reached=5))
    append_start(folder, Attempt("b", "002", started=6400.0, step=5, gpus=8))
    config = compose([*OVERRIDES, f"data.root={root / 'data'}"])
    config.data.mix = {folder.name: mix}
    (folder / "config.yaml").write_text(dump(config))
    return folder


@pytest.fixture
def run_of_two(run_directory: Path, tmp_path: Path) -> Path:
    """Two stages with data, and an evaluation of the second."""
    made_manifest(tmp_path / "data" / "captions", [30] * 20)
    done = read_done(run_directory / "import")
    write_stage(tmp_path, done, 1, {"captions": 1.0})
    stage = write_stage(tmp_path, done, 2, {"captions": 0.5, "gone": 0.5})
    (stage / "evaluation").mkdir()
    scores = {"held_out": 0.25, "broken": float("nan"), "none": None}
    for name, score in scores.items():
        value = {"exact_match": {"all": score}}
        (stage / "evaluation" / f"{name}.json").write_text(json.dumps(value))
    (stage / "evaluation" / "deep.json").write_text("[" * 100_000)
    return stage


def card(stage: Path, licence: str = "apache-2.0") -> str:
    done = read_done(stage)
    return render(stage, done, model_of(done, stage), 12_345, "bfloat16", licence)


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is named so, cut at pipes that are not escaped."""
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        cells = line.replace("\\\\", "\0").replace("\\|", "\1").split("|")
        rows.append([cell.strip() for cell in cells[1:-1]])
    return rows[:1] + rows[2:]


def test_card_of_a_run(run_of_two: Path) -> None:
    text = card(run_of_two)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "apache-2.0" and header["pipeline_tag"] == "image-text-to-text"
    stages = table(text, "stage")
    assert [row[:3] for row in stages[1:]] == [
        ["stage1", "1000", "256,000"],
        ["stage2", "2000", "256,000"],
    ]
    # 1 h of the first start, 1 h until the stage was finished; of eight GPUs.
    assert [row[5] for row in stages[1:]] == ["16.0", "16.0"]
    assert [row[6] for row in stages[1:]] == ["not evaluated", "held_out: 0.250"]
    assert stages[1][3:5] == ["connector", "vision tower, language_model"]
    data = table(text, "data set")
    assert data[1] == ["captions", "stage1, stage2", "20", "x 100%", "x 100%", "0 / 0 / 0"]
    assert len(data) == 2
    assert "could not be read when the card was written: gone." in text
    assert "Energy was not measured" in text
    for word in ("Intended use, and limits", "pt-PT", "4.57.6", "12,345 parameters in bfloat16"):
        assert word in text


def test_card_is_the_same_at_any_time(run_of_two: Path) -> None:
    """An export that goes on later must write the same bytes."""
    assert card(run_of_two) == card(run_of_two)
    assert "16.0" in card(run_of_two), "an open start counts until the stage's end, not until now"


def test_mean_of_a_stage_is_no_stage_of_its_own(run_of_two: Path) -> None:
    mean = run_of_two.with_name("stage2_mean")
    mean.mkdir()
    shutil.copyfile(run_of_two / "DONE.json", mean / "DONE.json")
    for stage in (run_of_two, mean):
        rows = table(card(stage), "stage")
        assert [row[0] for row in rows[1:]] == ["stage1", "stage2"]
        assert rows[2][5:] == ["16.0", "held_out: 0.250"]


def test_import_alone_claims_no_training(run_directory: Path) -> None:
    text = card(run_directory / "import", licence="")
    assert "Not trained yet" in text and "license:" not in text
    assert "GPU-hours" not in text and "## Data" not in text


HOSTILE = [
    "a | b | c",
    "two\nlines\r\n\n# Heading",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[free](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "https://evil.example www.evil.example x@evil.example",
    "`code` **bold** _it_ ~~gone~~ $x$",
    "trailing \\",
    "\\| escaped already",
    "&lt;b&gt; &#124;",
    "right \u202eto left\u2066 \u200b",
    "{{ 7 * 7 }} {% raw %}",
    "x" * 500,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(run_of_two: Path, name: str) -> None:
    done = read_done(run_of_two)
    write_done(run_of_two, replace(done, trained=[name], model={**done.model, "name": name}))
    text = card(run_of_two)
    rows = table(text, "stage")
    assert [len(row) for row in rows] == [7, 7, 7], "the row has other cells"
    shown = rows[2][3]
    assert text.splitlines().count(f"# {plain(name)}, after stage2") == 1
    assert "\n# Heading" not in text
    assert "<script" not in text and "<img" not in text and "&#124;" not in text
    assert "](" not in text.replace("\\](", "") and "![" not in text.replace("!\\[", "")
    assert "evil.example" not in shown or not any(
        live in shown for live in ("s://", "www.", "x@")
    ), "a reader would make a link of it"
    assert not any(mark in shown.replace("\\`", "") for mark in "`\u202e\u2066\u200b")
    assert len(shown) < 200


def test_plain_shows_ordinary_names_as_they_are() -> None:
    for name in ("fine_vision", "cc-by-4.0", "pt-PT 97%", "docvqa: 0.123", "São Tomé (v2)"):
        assert plain(name) == name
    assert plain("_a_ *b* c|d") == "\\_a\\_ \\*b\\* c\\|d"
