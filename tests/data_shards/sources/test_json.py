"""JSON from outside: bad rows among good ones, damaged files, bombs."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conf.schema.data import SourceConfig
from data_shards.sources import SourceError, SourceRow, json_list, json_text, jsonl, open_source
from data_shards.sources.json_text import JsonError, parse, parse_object


def read(path: Path, form: str, block_rows: int = 100) -> list[SourceRow]:
    source = open_source("s", SourceConfig(str(path), form))
    return [row for block in source.blocks(block_rows) for row in source.rows(block)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", r"not JSON \(Expecting property name"),
        (b"\xff\xfe", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' * 64 + b"[]" + b"}" * 64, "nested too deeply"),
        (b"[" * 2_000_000, r"over 1000000 of \[ \{"),
        (b"[" + b"0," * 5_000_000, "over 4000000 of ,"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not acceptable JSON .*4300 digits"),
        (b"", "not JSON"),
        (b'{"a": 1} {"b": 2}', r"not JSON \(Extra data"),
    ],
)
def test_what_is_not_acceptable(text: bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        parse_object(text)


def test_what_is_still_acceptable() -> None:
    assert parse_object(b'{"a":' * 63 + b"[]" + b"}" * 63)
    assert parse('{"score": NaN, "a": -Infinity, "b": 1e5}') == {"score": None, "a": None, "b": 1e5}


def test_jsonl_bad_lines_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 1}', b"{", b"", b"\xff\xfe", b"[1]", b"[" * 100_000, b"  "]
    path.write_bytes(b"\r\n".join([*lines, b'{"a": 2}']))
    found = read(path, "jsonl")
    assert [row.number for row in found] == [0, 1, 3, 4, 5, 7]
    assert [row.origin for row in found][:3] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    problems = [row.problem for row in found]
    assert problems[0] is None and problems[5] is None and None not in problems[1:5]
    assert [row.values.get("a") for row in found] == [1, None, None, None, None, 2]
    assert [row.number for row in read(path, "jsonl", 3)] == [0, 1, 3, 4, 5, 7]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_rows_too_long_to_hold(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    monkeypatch.setattr(json_text, "MAX_BYTES", 100)
    for module in (jsonl, json_list):
        monkeypatch.setattr(module, "_CHUNK", 64)
    rows = [json.dumps({"a": "x" * size}) for size in (500, 1, 150, 2, 500)]
    path = tmp_path / "a"
    path.write_text("\n".join(rows) if form == "jsonl" else f"[{','.join(rows)}]")
    for size in (1, 2, 100):
        found = read(path, form, size)
        assert [row.number for row in found] == [0, 1, 2, 3, 4]
        assert [row.problem is None for row in found] == [False, True, False, True, False]
        assert "over 100 bytes" in str(found[0].problem)


def test_list_bad_elements_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf [{"a": 1}, {"a": tru}, , [2], "x,]", \xff, {"a": "\\"]"}, ]\n ')
    found = read(path, "json")
    assert [row.values.get("a") for row in found] == [1, None, None, None, None, None, '"]', None]
    assert [row.problem is None for row in found] == [True, *[False] * 5, True, False]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1}\n{"a": 2}\n', "is not one JSON list .*format=jsonl"),
        (b"", "is not one JSON list"),
        (b'[{"a": 1}', "ends inside its list"),
        (b'[{"a": "1}]', "ends inside its list"),
        (b'[{"a": 1}]]', "goes on after its list"),
        (b"[1] [2]", "goes on after its list"),
    ],
)
def test_damaged_lists(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(SourceError, match=rf"a\.json {reason}"):
        read(tmp_path / "a.json", "json")


@pytest.mark.parametrize("text", [b"[]", b" [ \n ] "])
def test_empty_lists(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    assert read(tmp_path / "a.json", "json") == []


def test_lists_of_every_shape_against_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of what a scanner could trip over, cut at every place by chunks of every size."""
    generator = random.Random(5)
    path = tmp_path / "a.json"

    def value(depth: int) -> Any:
        kind = generator.randrange(5 if depth < 3 else 2)
        if kind < 2:
            return "".join(generator.choices('"\\,[]{}:é\n ', k=generator.randrange(9)))
        if kind == 2:
            return generator.choice([None, True, 12.5, -3])
        if kind == 3:
            return [value(depth + 1) for _ in range(generator.randrange(4))]
        return {str(value(3)): value(depth + 1) for _ in range(generator.randrange(4))}

    for chunk in (1, 2, 3, 5, 8, 13, 21, 1000):
        monkeypatch.setattr(json_list, "_CHUNK", chunk)
        rows = [{"v": value(0)} for _ in range(30)]
        ascii_only, indent = generator.random() < 0.5, generator.choice([None, 0, 3])
        path.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent), "utf-8")
        assert [row.values for row in read(path, "json", 7)] == rows


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (jsonl, json_list):
        monkeypatch.setattr(module, "_CHUNK", 1 << 16)
    record = json.dumps({"a": "x" * 4000}).encode()
    (tmp_path / "a.jsonl").write_bytes((record + b"\n") * 2000)
    (tmp_path / "a.json").write_bytes(b"[" + b",".join([record] * 2000) + b"]")
    for form in ("jsonl", "json"):
        source = open_source("s", SourceConfig(str(tmp_path / f"a.{form}"), form))
        tracemalloc.start()
        try:
            assert sum(1 for block in source.blocks(500) for _ in source.rows(block)) == 2000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Of 8 MB: some chunks of 64 kB with their masks, and one row.
        assert peak < 2 << 20, form


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_files_that_are_something_else(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a"
    for content, reason in (
        (gzip.compress(b"{}"), "compressed with gzip: unpack it first"),
        (b"PAR1....", "Parquet: set format=parquet"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16, not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=f"a is {reason}"):
            read(path, form)
