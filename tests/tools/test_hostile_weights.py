"""Weights from outside that are not what they seem are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conf.compose import compose
from conf.schema import ModelConfig
from models.hf_state import match_llava, table
from tests.tools.small_backbones import OVERRIDES
from tools.safetensors_reader import SafetensorsDirectory
from tools.weights_view import WeightsView


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return compose(OVERRIDES).model


def safetensors(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """A file by hand, with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), at: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + 8]}


HOSTILE = {
    "nothing": b"",
    "a few bytes": b"\1\0",
    "header beyond the file": safetensors({"a": entry()}, length=1 << 20),
    "header beyond any file": safetensors({"a": entry()}, length=1 << 62),
    "header of another kind": safetensors(b"[]"),
    "brackets": safetensors(b"[" * 100_000),
    "not UTF-8": safetensors(b'{"\xff": 1}'),
    "negative offset": safetensors({"a": entry(at=-8)}),
    "overlap": safetensors({"a": entry(), "b": entry()}),
    "hole": safetensors({"a": entry(at=8)}, b"\0" * 16),
    "cut short": safetensors({"a": entry()}, b"\0" * 7),
    "more behind": safetensors({"a": entry()}, b"\0" * 9),
    "wrong shape": safetensors({"a": entry(shape=(3,))}),
    "negative shape": safetensors({"a": entry(shape=(-2,))}),
    "shape that overflows": safetensors({"a": entry(shape=(1 << 62, 16))}),
    "no such dtype": safetensors({"a": entry("NaN")}),
    "int8": safetensors({"a": entry("I8", (8,))}),
    "float8": safetensors({"a": entry("F8_E4M3", (8,))}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    remedy = "is damaged .*; get the checkpoint again|give one that is not quantised"
    with pytest.raises(ValueError, match=rf"model\.safetensors.*({remedy})"):
        SafetensorsDirectory(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*({remedy})"):
        WeightsView(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "x\0.safetensors", "x.safetensors\n", "x.bin", 5],
)
def test_index_names_files_of_its_own_directory(tmp_path: Path, file: Any) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=r"index\.json names .*, not a file of its own directory"):
        SafetensorsDirectory(tmp_path)


def test_tensors_that_are_there_twice_are_named(model: ModelConfig, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    for name in "xy":
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors({"a": entry()}))
    with pytest.raises(ValueError, match=r"y\.safetensors: tensor a is in x\.safetensors as well"):
        SafetensorsDirectory(tmp_path)
    index.unlink()
    both = {"image_newline": torch.ones(2), "model.image_newline": torch.zeros(2)}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"image_newline.* are the same tensor; remove one"):
        WeightsView(tmp_path)
    with pytest.raises(ValueError, match="image_newline is there twice"):
        match_llava(SafetensorsDirectory(tmp_path).shapes(), model)


def test_table_without_rows_cannot_grow(model: ModelConfig) -> None:
    shapes = {
        name: shape
        for part in table(model)
        for name, shape in zip(part.hf, part.shapes, strict=True)
    }
    match_llava(shapes, model)
    name = "language_model.model.embed_tokens.weight"
    with pytest.raises(ValueError, match=f"{name} has no rows"):
        match_llava({**shapes, name: (0, shapes[name][1])}, model)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache keeps files under other names and links to them."""
    (tmp_path / "blob").write_bytes(safetensors({"a": entry()}))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blob")
    with SafetensorsDirectory(tmp_path / "snapshot") as source:
        assert source.read("a").tolist() == [0.0, 0.0]
