"""Rows exactly as the published data sets have them, through the checks of `parse_sample`."""

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema.data import SourceConfig
from data_shards import layouts
from data_shards.layouts import Rules, member_order, record_messages, to_fields
from data_shards.sample import Sample, SampleError, parse_sample
from data_shards.sources import SourceError, SourceRow, open_source
from tests.data_shards import toys

IMAGE = {"type": "image"}
PROMPTS = ["Descreve a imagem.", "O que se vê aqui?", "Faz uma legenda."]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(values: dict[str, Any], folder: Path = Path(), number: int = 0, **config: Any) -> Sample:
    """The row as the builder takes it."""
    source = SourceConfig("x", **config)
    fields = to_fields(SourceRow(number, "f:0", folder, values), source)
    return parse_sample(
        {"messages": fields.messages, "chosen": fields.chosen, "rejected": fields.rejected},
        fields.images,
        key="k",
        source="s",
        licence=fields.licence,
        origin="f:0",
        preference=source.preference,
    )


def through_parquet(folder: Path, table: pa.Table, **config: Any) -> list[Sample]:
    """The rows of a table written to a file, read as a source."""
    pq.write_table(table, folder / "a.parquet")
    found = open_source("s", SourceConfig(str(folder / "a.parquet"), **config))
    (block,) = found.blocks(100)
    return [read(dict(row.values), row.folder, row.number, **config) for row in found.rows(block)]


HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_openai_messages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"file")
    string = [user("<image>\nO que é?"), answer("Um gato.")]
    assert list(read({"messages": string, "images": [b"i"]}).messages) == string
    listed = [user([IMAGE, text("O que é?")]), answer([text("Um gato.")])]
    assert list(read({"messages": listed, "images": [b"i"]}).messages) == listed
    url = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    for item, data in (
        ({"type": "image_url", "image_url": {"url": url}}, b"inline"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, b"file"),
        ({"type": "image", "image": "a.png"}, b"file"),
        ({"type": "image", "image": {"bytes": b"here", "path": None}}, b"here"),
    ):
        sample = read({"messages": [user([item, text("?")]), answer("Um gato.")]}, tmp_path)
        assert sample.images == (data,) and sample.messages[0]["content"] == [IMAGE, text("?")]
    remote = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(SampleError, match="download the images first"):
        read({"messages": [user([remote]), answer("a")]})
    with pytest.raises(SampleError, match="some image items name their image and others do not"):
        read({"messages": [user([{"type": "image", "image": "a.png"}, IMAGE]), answer("a")]})


def test_messages_without_any_mark_show_their_images_first() -> None:
    sample = read({"messages": [user("Olá"), answer("a")], "images": [b"1", b"2"]})
    assert sample.messages[0]["content"] == [IMAGE, IMAGE, text("Olá")]
    with pytest.raises(SampleError, match="1 image placeholders but 2 images"):
        read({"messages": [user("<image>Olá"), answer("a")], "images": [b"1", b"2"]})
    with pytest.raises(SampleError, match="0 image placeholders but 1 images"):
        read({"messages": [user([text("Olá")]), answer("a")], "images": [b"1"]})


def test_nemotron_v2(tmp_path: Path) -> None:
    """nvidia/Nemotron-VLM-Dataset-v2, data_format.md."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "page.png").write_bytes(b"page")
    metadata = {"width": 1024, "height": 768, "format": "PNG", "mode": "RGB"}
    image = {"type": "image", "image": "path/page.png", "metadata": metadata}
    record: dict[str, Any] = {
        "id": "292180",
        "messages": [
            {"role": "system", "content": [text("Lê o documento.")]},
            user([image, text("Qual é o total?")]),
            answer([text("12,50 €")]),
        ],
    }
    sample = read(record, tmp_path)
    assert sample.images == (b"page",)
    assert sample.messages[1]["content"] == [IMAGE, text("Qual é o total?")]
    record["messages"][1]["content"][0] = {"type": "video", "video": "a.mp4"}
    with pytest.raises(SampleError, match="neither image nor text"):
        read(record, tmp_path)


def test_llava_and_nemotron_v1(tmp_path: Path) -> None:
    """LLaVA's docs/Finetune_Custom_Data.md; nvidia/Llama-Nemotron-VLM-Dataset-v1."""
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "1.jpg").write_bytes(b"jpg")
    said = [
        {"from": "human", "value": "<image>\nQue animal é?"},
        {"from": "gpt", "value": "Um <image> gato."},
        {"from": "human", "value": "De que cor?"},
        {"from": "gpt", "value": "Preto."},
    ]
    row = {"id": "1", "image": "gqa/1.jpg", "conversations": said}
    sample = read(row, tmp_path)
    assert sample.images == (b"jpg",)
    assert [m["content"] for m in sample.messages] == [
        [IMAGE, text("Que animal é?")],
        "Um <image> gato.",
        "De que cor?",
        "Preto.",
    ]
    last = [{"from": "human", "value": "Que animal é?\n<image>"}, said[1]]
    sample = read({**row, "conversations": last}, tmp_path)
    assert sample.messages[0]["content"] == [text("Que animal é?\n"), IMAGE]
    unmarked = [{"from": "human", "value": "Que animal é?"}, said[1]]
    sample = read({**row, "conversations": unmarked}, tmp_path)
    assert sample.messages[0]["content"] == [IMAGE, text("Que animal é?")]
    two = [{"from": "human", "value": "<image><image>\nCompara."}, said[1]]
    sample = read({"images": [b"1", b"2"], "conversations": two})
    assert sample.messages[0]["content"] == [IMAGE, IMAGE, text("Compara.")]


def test_llava_text_only_and_sharegpt() -> None:
    said = [
        {"from": "system", "value": "És prestável."},
        {"from": "gpt", "value": "a resposta que sobrou"},
        {"from": "human", "value": "Olá"},
        {"from": "gpt", "value": "Olá!"},
    ]
    for image in ({}, {"image": None}, {"image": ""}):
        sample = read({"conversations": said, **image})
        assert sample.images == () and [m["role"] for m in sample.messages] == [
            "system",
            "user",
            "assistant",
        ]
    with pytest.raises(SampleError, match="turn 0 is from 'tool'"):
        read({"conversations": [{"from": "tool", "value": "x"}]})
    with pytest.raises(SampleError, match="messages end with user"):
        read({"conversations": said[:3]})


def test_llava_next_data_in_parquet(tmp_path: Path) -> None:
    """lmms-lab/LLaVA-NeXT-Data: id, conversations, data_source, image."""
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    said = [{"from": "human", "value": "<image>\nO que é?"}, {"from": "gpt", "value": "Um gato."}]
    alone = [{"from": "human", "value": "Olá"}, {"from": "gpt", "value": "Olá!"}]
    table = pa.table(
        {
            "id": ["1", "2"],
            "conversations": pa.array([said, alone], pa.list_(turn)),
            "data_source": ["gqa", "sharegpt"],
            "image": pa.array([{"bytes": b"i", "path": "1.jpg"}, None], HF_IMAGE),
        }
    )
    first, second = through_parquet(tmp_path, table)
    assert first.images == (b"i",) and second.images == ()
    assert first.messages[0]["content"] == [IMAGE, text("O que é?")]


def test_finevision_in_parquet(tmp_path: Path) -> None:
    """HuggingFaceM4/FineVision: images, texts [{user, assistant}], source, ratings."""
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string())])
    texts = [{"user": "Que é?", "assistant": "Um gato."}, {"user": "E?", "assistant": "Preto."}]
    table = pa.table(
        {
            "images": pa.array([[{"bytes": b"1", "path": None}], []], pa.list_(HF_IMAGE)),
            "texts": pa.array([texts, texts[:1]], pa.list_(turn)),
            "source": ["ai2d", "text"],
            "relevance_ratings": pa.array([[5, 4], [3]]),
        }
    )
    first, second = through_parquet(tmp_path, table)
    assert [m["content"] for m in first.messages] == [
        [IMAGE, text("Que é?")],
        "Um gato.",
        "E?",
        "Preto.",
    ]
    assert second.images == () and second.messages[0]["content"] == "Que é?"
    with pytest.raises(SampleError, match="content of message 1 is NoneType"):
        read({"texts": [{"user": "a", "assistant": None}]})


def test_captions(tmp_path: Path) -> None:
    """Spawning/PD12M, its images downloaded beside the metadata."""
    (tmp_path / "x.jpg").write_bytes(b"jpg")
    row = {"id": "0", "file": "x.jpg", "caption": "Um elétrico.", "license": "CC0", "width": 3}
    columns = {"images": "file"}
    drawn = [
        read(row, tmp_path, number=n, columns=columns, prompts=PROMPTS).messages[0]["content"]
        for n in range(60)
    ]
    assert drawn[0][0] == IMAGE and {c[1]["text"] for c in drawn} == set(PROMPTS)
    again = read(row, tmp_path, number=7, columns=columns, prompts=PROMPTS)
    assert again.messages[0]["content"] == drawn[7] and again.messages[1] == answer("Um elétrico.")
    assert again.licence == "CC0" and again.images == (b"jpg",)
    with pytest.raises(SampleError, match="captions need prompts"):
        read(row, tmp_path, columns=columns)
    with pytest.raises(SampleError, match="licence is not one line"):
        read({**row, "license": "a\nb"}, tmp_path, columns=columns, prompts=PROMPTS)


def test_questions() -> None:
    sample = read({"image": b"i", "question": "Quantos?", "answer": "Três."})
    assert list(sample.messages) == [user([IMAGE, text("Quantos?")]), answer("Três.")]
    with pytest.raises(SampleError, match="content of message 1 is int|content of message 1"):
        read({"image": b"i", "question": "Quantos?", "answer": 3})
    with pytest.raises(SampleError, match="set preference=true"):
        read({"image": b"i", "question": "Quantos?", "chosen": "a", "rejected": "b"})


def test_mmpr(tmp_path: Path) -> None:
    """OpenGVLab/MMPR-v1.2: JSON lines of image, question, chosen, rejected."""
    (tmp_path / "1.jpg").write_bytes(b"jpg")
    row = {"image": "1.jpg", "question": "Quantos?", "chosen": "Três.", "rejected": "Dois."}
    sample = read(row, tmp_path, preference=True)
    assert list(sample.messages) == [user([IMAGE, text("Quantos?")])]
    assert (sample.chosen, sample.rejected) == ("Três.", "Dois.")
    marked = read({**row, "question": "<image>\nQuantos?"}, tmp_path, preference=True)
    assert marked.messages == sample.messages
    with pytest.raises(SampleError, match="no column|a pair also needs chosen and rejected"):
        read({"image": "1.jpg", "question": "Quantos?"}, tmp_path, preference=True)


def test_trl_pairs(tmp_path: Path) -> None:
    """trl-lib/rlaif-v (Parquet), and the other preference forms of TRL's dataset_formats."""
    item = pa.struct([("text", pa.string()), ("type", pa.string())])
    message = pa.struct([("content", pa.list_(item)), ("role", pa.string())])
    prompt = [user([{"type": "image", "text": None}, text("O que é?")])]
    table = pa.table(
        {
            "images": pa.array([[{"bytes": b"i", "path": None}]], pa.list_(HF_IMAGE)),
            "prompt": pa.array([prompt], pa.list_(message)),
            "chosen": pa.array([[answer([text("Sim.")])]], pa.list_(message)),
            "rejected": pa.array([[answer([text("Não.")])]], pa.list_(message)),
        }
    )
    (sample,) = through_parquet(tmp_path, table, preference=True)
    assert list(sample.messages) == [user([IMAGE, text("O que é?")])]
    assert (sample.chosen, sample.rejected, sample.images) == ("Sim.", "Não.", (b"i",))
    plain = {"prompt": "Olá", "chosen": "Sim.", "rejected": "Não."}
    assert read(plain, preference=True).messages == (user("Olá"),)
    shared = {
        "chosen": [user("Olá"), answer("Sim.")],
        "rejected": [user("Olá"), answer("Não.")],
    }
    # HuggingFaceH4/ultrafeedback_binarized has them beside the prompt and one conversation.
    beside = {**shared, "prompt": "Olá", "messages": shared["chosen"]}
    for row in (shared, beside):
        sample = read(row, preference=True)
        assert sample.messages == (user("Olá"),) and sample.chosen == "Sim."
    with pytest.raises(SampleError, match="it has no question"):
        read({"chosen": "Sim.", "rejected": "Não."}, preference=True)
    factory = {
        "conversations": [{"from": "human", "value": "Olá"}],
        "chosen": {"from": "gpt", "value": "Sim."},
        "rejected": {"from": "gpt", "value": "Não."},
    }
    assert read(factory, preference=True).rejected == "Não."
    ours = {"messages": [user("Olá")], "chosen": "Sim.", "rejected": "Não."}
    assert read(ours, preference=True).chosen == "Sim."


def test_text_replay_and_boxes_stay_as_they_are() -> None:
    boxes = "O gato está em [12, 30, 450, 512] e o <box>(1,2),(3,4)</box>."
    sample = read({"messages": [user("Onde está?"), answer(boxes)]})
    assert sample.images == () and sample.messages[1]["content"] == boxes
    assert sample.messages[0]["content"] == "Onde está?"


def test_named_columns(tmp_path: Path) -> None:
    """Nested ones by a dotted name; which kind of turns a named column holds, the turns tell."""
    columns = {"messages": "data.turns", "images": "data.foto", "licence": "meta.licence"}
    said = [{"from": "human", "value": "<image>O que é?"}, {"from": "gpt", "value": "Um gato."}]
    table = pa.table(
        {
            "data": [{"turns": said, "foto": b"i", "other": 1}],
            "meta": [{"licence": "CC-BY-4.0"}],
            "caption": ["x"],
        }
    )
    (sample,) = through_parquet(tmp_path, table, columns=columns)
    assert sample.images == (b"i",) and sample.licence == "CC-BY-4.0"
    assert sample.messages[0]["content"] == [IMAGE, text("O que é?")]
    with pytest.raises(SourceError, match=r"no column nada \(there are caption, data, meta\)"):
        through_parquet(tmp_path, table, columns={"messages": "nada"})
    expected = r"a\.parquet: no layout fits the columns caption, data, meta \(captions need prompts"
    with pytest.raises(SourceError, match=expected):
        through_parquet(tmp_path, table)
    explicit = {"layout": "conversations", "columns": columns}
    assert through_parquet(tmp_path, table, **explicit) == [sample]
    with pytest.raises(SampleError, match="content of message 0 is NoneType"):
        through_parquet(tmp_path, table, **{**explicit, "layout": "texts"})


def test_messages_as_json_text() -> None:
    sample = read(
        {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}
    )
    assert sample.messages == (user("a"), answer("b"))
    for value in ("{", "[" * 100_000, '"text"', "1" * 5000):
        with pytest.raises(SampleError, match="messages is"):
            read({"messages": value})


@pytest.mark.parametrize("value", [3, [None], [""], [{"bytes": None, "path": None}], [["a"]]])
def test_what_is_no_image(value: object) -> None:
    with pytest.raises(SampleError, match="image 0 is neither bytes nor a path"):
        read({"messages": [user("<image>"), answer("a")], "images": value})


def test_more_images_than_a_sample_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    row = {"messages": [user("<image>"), answer("a")], "images": ["a.png"] * 3}
    monkeypatch.setattr(layouts, "MAX_BYTES", 9)
    with pytest.raises(SampleError, match="have over 9 bytes"):
        read(row, tmp_path)
    monkeypatch.setattr(layouts, "MAX_IMAGES", 2)
    with pytest.raises(SampleError, match="3 images, more than 2"):
        read(row, tmp_path)


def test_foreign_records() -> None:
    """JSON members of shards that are not ours, as they are read at load time."""
    rules = Rules.from_json(Rules("auto", {}, tuple(PROMPTS), False).to_json())
    said = [{"from": "human", "value": "O que é?"}, {"from": "gpt", "value": "Um gato."}]
    messages, chosen, rejected = record_messages({"conversations": said}, rules, 5, 1)
    assert messages == [user([IMAGE, text("O que é?")]), answer("Um gato.")]
    assert chosen is rejected is None
    first = record_messages({"caption": "Um gato."}, rules, 5, 1)
    assert first == record_messages({"caption": "Um gato."}, rules, 5, 1)
    with pytest.raises(SampleError, match="not a mapping"):
        record_messages([1], rules, 5, 1)


def test_which_member_an_image_is() -> None:
    assert member_order([], ["k.10.png", "k.9.png", "k.0.png"]) == [2, 1, 0]
    assert member_order([], ["k.2.jpg", "k.10.png", "k.1.webp", "k.a"]) == [2, 0, 1, 3]
    assert member_order(["other/name.jpg"], ["k.jpg"]) == [0]
    assert member_order(["k.9.png", "k.10.png"], ["a/k.10.png", "a/k.9.png"]) == [1, 0]
    assert member_order(["x/1.png", {"bytes": None, "path": "0.png"}], ["k.0.png", "k.1.png"]) == [
        1,
        0,
    ]
    for references in (["b.png", "a.png"], ["0.png", "0.png"], ["0.png"], [b"bytes", "0.png"]):
        with pytest.raises(SampleError):
            member_order(references, ["k.0.png", "k.1.png"])
    row = SourceRow(0, "t:k", Path(), {"caption": "Um gato."}, None, [("k.jpg", b"jpg")])
    fields = to_fields(row, SourceConfig("x", "webdataset", prompts=PROMPTS))
    assert fields.images == [b"jpg"] and fields.layout == "caption"


def test_toy_rows_of_the_other_tests() -> None:
    for row in toys.chat_rows(8):
        assert list(read(row).messages) == row["messages"]
    for row in toys.pair_rows(4):
        assert read(row, preference=True).chosen == row["chosen"]
