"""Parquet as Hugging Face's own library writes it, with the features of the published data sets."""

from pathlib import Path
from typing import Any

import pytest

from conf.schema.data import SourceConfig
from data_shards.layouts import Fields, to_fields
from data_shards.sources import open_source
from tests.data_shards import toys

datasets = pytest.importorskip("datasets", reason="installed with the dev extra")
IMAGE = {"type": "image"}


def written(path: Path, rows: list[dict[str, Any]], features: dict[str, Any]) -> list[Fields]:
    """The rows, written by datasets and read as a source."""
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(str(path), batch_size=2)
    config = SourceConfig(str(path), preference="chosen" in features)
    found = open_source("s", config)
    return [to_fields(row, config) for block in found.blocks(2) for row in found.rows(block)]


def test_the_published_features(tmp_path: Path) -> None:
    text, image = datasets.Value("string"), datasets.Image()
    picture = toys.picture(0, 20, 30)

    texts = [{"user": "O que é?", "assistant": "Um gato."}]
    finevision = written(
        tmp_path / "finevision.parquet",
        [{"images": [picture] * n, "texts": texts, "source": "ai2d"} for n in range(3)],
        {
            "images": datasets.Sequence(image),
            "texts": [{"user": text, "assistant": text}],
            "source": text,
        },
    )
    assert [len(fields.images) for fields in finevision] == [0, 1, 2]
    assert finevision[2].messages[0]["content"][:2] == [IMAGE, IMAGE]
    assert finevision[1].images[0].startswith(b"\x89PNG")

    said = [{"from": "human", "value": "<image>\nO que é?"}, {"from": "gpt", "value": "Um gato."}]
    llava_next = written(
        tmp_path / "llava_next.parquet",
        [
            {"id": "1", "conversations": said, "data_source": "gqa", "image": picture},
            {"id": "2", "conversations": said[1:], "data_source": "text", "image": None},
        ],
        {
            "id": text,
            "conversations": [{"from": text, "value": text}],
            "data_source": text,
            "image": image,
        },
    )
    assert llava_next[0].messages[0]["content"][0] == IMAGE
    assert [len(fields.images) for fields in llava_next] == [1, 0]

    message = [{"content": [{"text": text, "type": text}], "role": text}]
    item = {"text": None, "type": "image"}
    question = {"content": [item, {"text": "O que é?", "type": "text"}], "role": "user"}
    answers = {
        name: [{"content": [{"text": said, "type": "text"}], "role": "assistant"}]
        for name, said in (("chosen", "Um gato."), ("rejected", "Um cão."))
    }
    (pair,) = written(
        tmp_path / "rlaif_v.parquet",
        [{**answers, "prompt": [question], "images": [picture]}],
        {
            "chosen": message,
            "rejected": message,
            "prompt": message,
            "images": datasets.Sequence(image),
        },
    )
    assert pair.messages[0]["content"][0] == IMAGE and len(pair.images) == 1
    assert pair.chosen[0]["content"][0]["text"] == "Um gato."
