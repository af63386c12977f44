"""The demo's Parquet files: what the data builder accepts, split by scan, the same every time."""

import hashlib
import io
import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from conf.compose import compose
from data_shards.sample import parse_sample
from tools.command import run
from tools.demo.canvases import load_scans
from tools.demo.evaluation import pair_rows, question_rows
from tools.demo.language import KINDS, QUESTIONS
from tools.demo.sources import SOURCES, training_rows
from tools.demo_data import main, write_demo_data
from tools.questions import read_pairs, read_questions


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "raw"
    assert write_demo_data(out, seed=5, scale=0.02)
    return out


def rows_of(raw, source):
    return pq.read_table(raw / source / "train.parquet").to_pylist()


def test_configuration_names_these_sources():
    data = compose(["stage=stage2", "run=x"]).data
    assert set(data.sources) == set(SOURCES)
    for name, source in data.sources.items():
        assert source.input == f"runs/x/raw/{name}/*.parquet"
        assert source.preference == (name == "preferences")


@pytest.mark.parametrize("source", SOURCES)
def test_rows_pass_the_data_builders_checks(raw, source):
    rows = rows_of(raw, source)
    assert len({row["key"] for row in rows}) == len(rows) > 10
    for row in rows:
        sample = parse_sample(
            row,
            row["images"],
            key=row["key"],
            source=source,
            licence="CC-BY-4.0",
            origin="test",
            preference=source == "preferences",
        )
        assert len(sample.images) == (source != "text")
        for data in sample.images:
            assert Image.open(io.BytesIO(data)).format == "PNG"
            assert len(data) < 40_000


def test_training_shows_training_scans_only(raw):
    train = set(load_scans()["train"].numbers.tolist())
    shown = [set(row["scans"]) for source in SOURCES for row in rows_of(raw, source)]
    assert set.union(*shown) <= train
    assert len(set.union(*shown)) > 100


@pytest.mark.parametrize("split", ["dev", "held_out"])
def test_evaluation_shows_its_own_scans_only(raw, split):
    own = set(load_scans()[split].numbers.tolist())
    for name in (split, f"{split}_pairs"):
        for row in pq.read_table(raw / "evaluation" / f"{name}.parquet").to_pylist():
            assert set(row["scans"]) <= own and row["scans"]


@pytest.mark.parametrize("split", ["dev", "held_out"])
def test_evaluation_files_are_read_by_the_evaluation(raw, split):
    questions = read_questions(raw / "evaluation" / f"{split}.parquet")
    assert [q.kind for q in questions[:5]] == list(KINDS)
    known = {w.question for kind in QUESTIONS.values() for w in kind}
    assert {q.question for q in questions} == known
    assert {q.layout for q in questions} == {"single", "wide", "tall", "grid"}
    pairs = read_pairs(raw / "evaluation" / f"{split}_pairs.parquet")
    assert {p.kind for p in pairs} == {"style", "style_unseen", "truth"}


def test_dev_and_held_out_differ():
    one = [row["image"] for row in question_rows("dev", 40, 0)]
    other = [row["image"] for row in question_rows("held_out", 40, 0)]
    assert not set(one) & set(other)


def test_same_seed_same_rows_whatever_is_drawn_beside_them():
    assert list(training_rows("vqa", 5, 1)) == list(training_rows("vqa", 9, 1))[:5]
    assert list(training_rows("vqa", 5, 1)) != list(training_rows("vqa", 5, 2))
    assert list(pair_rows("dev", 3, 1)) == list(pair_rows("dev", 3, 1))


def test_files_are_the_same_bytes_again(raw, tmp_path):
    write_demo_data(tmp_path / "raw", seed=5, scale=0.02)
    files = sorted(path.relative_to(raw) for path in raw.rglob("*.parquet"))
    assert len(files) == 9
    for file in files:
        digests = [
            hashlib.sha256((r / file).read_bytes()).digest() for r in (raw, tmp_path / "raw")
        ]
        assert digests[0] == digests[1], file


def test_style_source_holds_both_varieties(raw):
    texts = [row["messages"][-1]["content"] for row in rows_of(raw, "style")]
    brazil = sum("vendo" in text or "tela" in text or "celular" in text for text in texts)
    portugal = sum("a ver" in text or "ecrã" in text or "telemóvel" in text for text in texts)
    assert brazil and portugal


def test_second_run_does_nothing_and_changed_settings_do(raw):
    before = (raw / "captions" / "train.parquet").stat().st_mtime_ns
    assert not write_demo_data(raw, seed=5, scale=0.02)
    assert (raw / "captions" / "train.parquet").stat().st_mtime_ns == before
    record = json.loads((raw / "DONE.json").read_text())
    assert record["rows"]["captions"] == len(rows_of(raw, "captions"))


def test_interrupted_run_is_made_again(tmp_path):
    out = tmp_path / "raw"
    write_demo_data(out, seed=6, scale=0.01)
    (out / "DONE.json").unlink()
    assert write_demo_data(out, seed=6, scale=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale=0"], "leaves a source without rows"),
        (["seed=x"], "seed= takes an integer"),
        (["colour=red"], "unknown argument 'colour=red'"),
    ],
)
def test_bad_arguments_are_one_line(words, message, tmp_path, capsys):
    assert run(main, [f"out={tmp_path}", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
