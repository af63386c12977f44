"""The page of a source: what it says, that it is self-contained, and that nothing in it is markup
of the data."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conf.schema.data import DataConfig, SourceConfig
from data_shards import build, preview, preview_sample
from data_shards.chat import ChatTokenizer
from data_shards.preview import write_preview
from data_shards.sources import SourceError
from tests.data_shards import toys

HOSTILE = '<script>alert("x")</script> & <img src=https://example.com/x.png> \u202e<image>'


class _Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[str]:
        return [str(attrs["href"]) for tag, attrs in self.tags if tag == "image"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def page(
    folder: Path, records: list[Any], tokenizer: Path, samples: int = 10, **config: Any
) -> _Page:
    toys.write_jsonl(folder / "a.jsonl", records)
    source = SourceConfig(str(folder / "a.jsonl"), "jsonl", **config)
    model = toys.model_config(ChatTokenizer.from_directory(toys_tokenizer(tokenizer)))
    data = DataConfig(str(folder / "root"), str(tokenizer))
    path = write_preview("fonte", source, data, model, folder / "pages", samples)
    assert path == folder / "pages" / "fonte.html" and not (folder / "root").exists()
    return _Page(path.read_text(encoding="utf-8"))


def toys_tokenizer(tokenizer: Path) -> Path:
    """A tokenizer for the model's sizes, also where the source has none."""
    return tokenizer if tokenizer.exists() else tokenizer.parent


def chat(answer: str, image: str | None = None) -> dict[str, Any]:
    turns = [{"from": "human", "value": "O que é?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, "id": 1, **({"image": image} if image else {})}


def test_what_a_page_shows(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.png").write_bytes(toys.encoded(toys.picture(0, 40, 90)))
    records = [chat("Um gato.", "a.png"), chat("Outro."), chat(" "), chat("x", "b.png"), b"{"]
    shown = page(tmp_path, records, tokenizer, licence="CC-BY-4.0")
    text = " ".join(shown.text.split())
    assert "5 rows in 1 file" in text and "5 looked at" in text
    assert "2 usable" in text and "3 refused" in text
    assert "conversations detected" in text
    assert "images ← image , messages ← conversations" in text and "left aside id" in text
    assert "a.jsonl:3 the answer of turn 1 is empty" in text
    assert "a.jsonl:4 image 'b.png' does not exist in the image folder" in text
    assert "a.jsonl:5 the line: not JSON" in text
    rows, columns = toys.GEOMETRY.tile_grid(40, 90)
    tiles, tokens = toys.GEOMETRY.n_tiles(40, 90), toys.GEOMETRY.n_tokens(40, 90)
    assert f"1 + {columns}×{rows} = {tiles} tiles, {tokens} tokens" in text
    assert "90×40 px" in text and "CC-BY-4.0" in text
    assert len(shown.images()) == 1 and shown.images()[0].startswith("data:image/jpeg;base64,")
    encoder = ChatTokenizer.from_directory(tokenizer)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "O que é?"}]},
        {"role": "assistant", "content": "Um gato."},
    ]
    one = encoder.encode(messages, [tokens])
    assert f"{len(one.ids)} tokens {one.n_targets} trained on" in text
    assert "<|im_start|>assistant Um gato.<|im_end|>" in text


def test_text_of_the_data_is_text(tmp_path: Path, tokenizer: Path) -> None:
    records = [chat(HOSTILE), {**chat("a"), HOSTILE: 1}, {"conversations": [{"from": HOSTILE}]}]
    shown = page(tmp_path, records, tokenizer, licence=HOSTILE[:30])
    tags = {tag for tag, _ in shown.tags}
    allowed = "html head meta title style body main h1 h2 div b span section dl dt dd code article "
    allowed += "svg rect image path text g use figure figcaption br details summary pre mark table "
    assert tags <= set((allowed + "tr th td").split())
    assert HOSTILE in shown.text
    for _, attributes in shown.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "src"
            assert name != "href" or re.match(r"data:image/jpeg;base64,|#", str(value))
    policies = [a["content"] for t, a in shown.tags if t == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pairs_show_both_answers(tmp_path: Path, tokenizer: Path) -> None:
    row = {"question": "Como?", "chosen": "De autocarro.", "rejected": "De ônibus."}
    text = " ".join(page(tmp_path, [row], tokenizer, preference=True).text.split())
    assert "chosen, trained on De autocarro." in text and "rejected, trained on De ônibus." in text
    assert "preference pairs" in text and "layout question" in text
    assert text.count("<|im_start|>assistant De ") == 2


def test_without_a_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    text = page(tmp_path, [chat("Um gato.")], tokenizer / "none").text
    assert "Text tokens are not counted" in text and "Um gato." in text
    assert "As the model reads it" not in text


def test_samples_come_from_all_over_the_source(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_BLOCK_ROWS", 20)
    records = [chat("") if n < 30 else chat(f"resposta {n}") for n in range(200)]
    shown = page(tmp_path, records, tokenizer, samples=5)
    numbers = [int(n.replace(",", "")) for n in re.findall(r"Row (\d+)", shown.text)]
    assert len(numbers) == 5 and max(numbers) >= 160 and min(numbers) >= 30
    assert "Refused among the" in shown.text


def test_nothing_usable_nothing_there(tmp_path: Path, tokenizer: Path) -> None:
    text = page(tmp_path, [{"a": 1}], tokenizer).text
    assert "No row that was looked at is usable" in text and "no layout fits the columns a" in text
    assert "The source has no rows" in page(tmp_path, [], tokenizer).text
    with pytest.raises(SourceError, match="matches no file"):
        source = SourceConfig(str(tmp_path / "none.jsonl"), "jsonl")
        model = toys.model_config(ChatTokenizer.from_directory(tokenizer))
        write_preview("s", source, DataConfig("r", str(tokenizer)), model, tmp_path / "p")


def test_long_texts_are_cut(tmp_path: Path, tokenizer: Path) -> None:
    text = page(tmp_path, [chat("palavra " * 2000)], tokenizer).text
    assert f"{16000 - preview_sample.MOST_TEXT:,} more characters" in text


def test_the_command(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """dry=1 draws what can be drawn, and fails for the sources that cannot be read."""
    toys.write_jsonl(tmp_path / "a.jsonl", [chat("Um gato.")])
    words = ["data=demo", "dry=1", f"runs_dir={tmp_path / 'runs'}", "run=r", "only=[text,vqa]"]
    words += [f"data.tokenizer={tokenizer}", f"data.root={tmp_path / 'root'}"]
    words += ["data.sources.vqa.format=jsonl", f"data.sources.vqa.input={tmp_path / '*.jsonl'}"]
    assert build.main(words) == 1
    said = capsys.readouterr()
    assert said.out == f"vqa: {tmp_path / 'runs' / 'r' / 'preview' / 'vqa.html'}\n"
    assert said.err.startswith("error: data.sources.text.input=") and said.err.count("\n") == 1
    assert build.main([*words, "only=[vqa]"]) == 0
    assert not (tmp_path / "root").exists()
