"""Cards against counts made another way, hostile text on them, and what they do without."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.schema.data import SourceConfig
from data_shards.build import build_dataset
from data_shards.card import charts, figures, write_card
from data_shards.card.__main__ import main
from data_shards.card.figures import quantile, read_figures
from data_shards.card.overview import write_overview
from data_shards.card.samples import chosen_rows
from data_shards.chat import ChatTokenizer
from data_shards.manifest import read_manifest
from data_shards.variety_judge import AGREEMENT, MODEL
from tests.data_shards import toys
from tests.data_shards.conftest import World

EVIL = "<script>alert('1')</script><img src=x onerror=alert(2)>\"&{{ 7 * 7 }}"
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag is closed by its own."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def root(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the data sets `chats` and `pairs`, and `evil`, whose texts attack the page."""
    folder = tmp_path_factory.mktemp("cards")
    for name in ("chats", "pairs"):
        shutil.copytree(world.manifests[name].path.parent, folder / name)
    rows = [
        {"role": "user", "content": f"{EVIL} {number}"}
        | {"answer": f"{EVIL} {number}" if number else " "}
        for number in range(4)
    ]
    records = [
        {
            "messages": [
                {"role": "user", "content": row["content"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    path = toys.write_jsonl(folder / f"{EVIL[:8]}.jsonl", [*records, {EVIL: 1}, records[3]])
    source = SourceConfig(str(path), format="jsonl", licence=EVIL)
    data = toys.data_config(folder, Path(world.data.tokenizer), evil=source)
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    build_dataset("evil", source, data, toys.GEOMETRY, tokenizer.digest())
    return folder


def _long(folder: Path) -> dict[tuple[str, str], float]:
    table = pq.read_table(folder / "card.parquet").to_pylist()
    return {(row["metric"], row["label"]): row["value"] for row in table}


@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_figures_are_those_of_the_manifest(root: Path, name: str) -> None:
    write_card(root / name, name)
    found = _long(root / name)
    rows = pq.read_table(root / name / "manifest.parquet").to_pylist()
    assert found["count", "samples"] == len(rows)
    assert found["count", "images"] == sum(len(row["images"]) for row in rows)
    assert found["count", "tiles"] == sum(row["tiles"] for row in rows)
    lengths = [row["tokens"] for row in rows]
    lengths += [row["tokens_rejected"] for row in rows if row["tokens_rejected"]]
    assert found["count", "tokens"] == sum(lengths)
    expected: dict[str, Counter[Any]] = {
        "tokens of a document": Counter(lengths),
        "tiles of a sample": Counter(row["tiles"] for row in rows),
        "images of a sample": Counter(len(row["images"]) for row in rows),
        "licence": Counter(row["licence"] for row in rows),
        "variety": Counter(row["variety"] for row in rows),
        "language": Counter(row["language"] for row in rows),
    }
    for metric, counts in expected.items():
        got = {label: value for (m, label), value in found.items() if m == metric}
        assert got == {str(label): value for label, value in counts.items()}, metric
    assert (
        found["tokens of a document, quantile", "0.5"] == sorted(lengths)[(len(lengths) - 1) // 2]
    )
    sizes = {label: v for (m, label), v in found.items() if m == "width x height of an image"}
    assert sum(sizes.values()) == found["count", "images"]
    assert (
        found["manifest digest", read_manifest(root / name / "manifest.parquet").info.digest]
        is None
    )


def test_batches_do_not_change_the_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_figures(root / "chats", "chats")
    monkeypatch.setattr(figures, "_BATCH", 5)
    parts = read_figures(root / "chats", "chats")
    for field, value in vars(whole).items():
        assert np.array_equal(value, getattr(parts, field)), field


def test_a_card_is_the_same_each_time(root: Path) -> None:
    write_card(root / "chats", "chats")
    before = (root / "chats" / "card.html").read_bytes()
    write_card(root / "chats", "chats")
    assert (root / "chats" / "card.html").read_bytes() == before


def test_nothing_on_a_card_is_live_or_from_outside(root: Path) -> None:
    for name in ("chats", "pairs", "evil"):
        write_card(root / name, name)
    write_overview(root, ["chats", "pairs", "evil", EVIL])
    for path in (*root.glob("*/card.html"), root / "card.html"):
        page = Page(path.read_text(encoding="utf-8"))
        assert not page.tags.keys() & {"script", "iframe", "link", "object", "form"}
        for tag, name, value in page.attributes:
            assert not name.startswith("on"), (path, tag, name)
            if name in ("src", "href"):
                assert value.startswith("data:image/jpeg;base64,") or re.fullmatch(
                    r"\w+/card\.html", value
                )
    evil = Page((root / "evil" / "card.html").read_text(encoding="utf-8"))
    assert f"{EVIL} 2" in evil.text and evil.text.count(EVIL) > 6  # shown as it was written


def test_what_was_left_out_is_named(root: Path) -> None:
    found = _long(root / "evil")
    assert (found["count", "samples"], found["count", "refused"]) == (3, 2)
    assert found["count", "rows read"] == 6
    assert found["duplicates", "the same text and images | evil"] == 1
    assert found["refused", "the answer of turn … is empty"] == 1


def test_reasons_are_put_together_by_kind(tmp_path: Path, root: Path) -> None:
    folder = shutil.copytree(root / "chats", tmp_path / "set")
    reasons = [("refused", f"image {n}: {n * 7}x3 px is too small") for n in range(5)]
    reasons += [("refused", "tag '<b>' is odd"), ("refused", "tag '<i>' is odd")]
    reasons += [("duplicate", f"an image alike to evaluation set: row {n} of mmmu") for n in (1, 2)]
    reasons += [("duplicate", "images alike to those of row 12 of web")]
    lines = [
        json.dumps({"origin": f"f:{n}", "key": "k", "kind": kind, "reason": reason})
        for n, (kind, reason) in enumerate(reasons)
    ]
    (folder / "quarantine").mkdir(exist_ok=True)
    (folder / "quarantine" / "reasons.jsonl").write_text("\n".join(lines) + "\n")
    read = read_figures(folder, "set")
    assert {kind: reason.count for kind, reason in read.refused.items()} == {
        "image …: …x… px is too small": 5,
        "tag '…' is odd": 2,
    }
    assert read.refused["tag '…' is odd"].origin == "f:5"
    assert {kind: reason.count for kind, reason in read.duplicates.items()} == {
        ("an image alike", "mmmu (evaluation)"): 2,
        ("images alike", "web"): 1,
    }


def test_both_verdicts_are_shown_apart(tmp_path: Path, root: Path) -> None:
    folder = shutil.copytree(root / "chats", tmp_path / "set")
    hits = {"autocarro": 7, f"{MODEL}pt-PT": 20, f"{AGREEMENT}undecided, pt-PT": 20, "gone": 1}
    (folder / "hits.json").write_text(json.dumps(hits))
    write_card(folder, "set")
    page = Page((folder / "card.html").read_text(encoding="utf-8"))
    assert "What the staged model says" in page.text and "undecided, pt-PT" in page.text
    assert _long(folder)["rule hits", f"{MODEL}pt-PT"] == 20


def test_a_sample_that_cannot_be_read_is_named_and_does_not_stop_the_card(
    tmp_path: Path, root: Path
) -> None:
    folder = shutil.copytree(root / "chats", tmp_path / "set")
    shard = next((folder / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = b"\xff" * (len(data) // 2)
    shard.write_bytes(data)
    write_card(folder, "set")
    page = Page((folder / "card.html").read_text(encoding="utf-8"))
    assert "CRC-32 of its JSON differs" in page.text and "could not be read" in page.text


def test_chosen_samples_are_spread_and_different(root: Path) -> None:
    manifest = read_manifest(root / "chats" / "manifest.parquet")
    rows = chosen_rows(manifest, 6, "shown")
    assert [row * 6 // len(manifest) for row in rows] == list(range(6))
    assert chosen_rows(manifest, 1000, "shown") == list(range(len(manifest)))
    assert chosen_rows(manifest, 6, "turns") != rows


def test_quantiles_and_bins() -> None:
    values = np.random.default_rng(0).integers(0, 5000, 9999)
    counts = np.bincount(values)
    for share in (0.05, 0.5, 0.95):
        assert quantile(counts, share) == np.quantile(values, share, method="inverted_cdf")
    assert quantile(np.zeros(4, int), 0.5) == 0
    labels, binned = charts.equal_bins(counts)
    assert sum(binned) == 9999 and len(labels) == len(binned) <= 28
    edges = [int(label.strip("+").replace(",", "")) for label in labels]
    expected = np.histogram(values, [*edges, 1 << 30])[0]
    assert binned == expected.tolist()
    assert charts.equal_bins(np.zeros(3, int)) == ([], [])


def test_charts_of_nothing_and_of_odd_labels() -> None:
    for chart in _charts():
        assert Page(chart).tags["svg"] == 1 and "<b>" not in chart


def _charts() -> Iterator[str]:
    yield charts.columns([], [], "nothing")
    yield charts.columns(["<b>", "b"], [0, 10**12], "<b>")
    yield charts.shares({}, {}, "nothing")
    yield charts.shares({"<b>": 3}, {}, "one")
    yield charts.table_of_sizes(np.zeros((4, 4), np.int64), 2, "nothing")


def test_the_command_writes_cards_again(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(root / "chats", tmp_path / "captions")
    (folder / "card.html").unlink(missing_ok=True)
    overrides = ["data=demo", f"data.root={tmp_path}"]
    assert main([*overrides, "only=[captions]"]) == 0
    assert capsys.readouterr().out.split() == [f"{folder}/card.html", f"{tmp_path}/card.html"]
    assert (folder / "card.html").exists()
    assert 'href="captions/card.html"' in (tmp_path / "card.html").read_text(encoding="utf-8")
    assert main([*overrides, "only=vqa"]) == 1
    assert "has none of vqa; build them first (make shards)" in capsys.readouterr().err
