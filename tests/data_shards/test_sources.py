"""Rows of Parquet and JSONL sources, and the paths they may name."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.sample import SampleError
from data_shards.sources import jsonl, parquet
from data_shards.sources.rows import SourceError, SourceRow, read_inside
from tests.data_shards import toys


def row(folder: Path, images: object) -> SourceRow:
    return SourceRow(0, "f:0", folder, {"images": images})


def test_images_as_bytes_structs_and_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"file")
    forms = [b"raw", {"bytes": b"in", "path": "x.png"}, {"bytes": None, "path": "sub/a.png"}]
    assert row(tmp_path, [*forms, "sub/a.png"]).images() == [b"raw", b"in", b"file", b"file"]
    assert row(tmp_path, forms[1]).images() == [b"in"]  # a single image column
    assert row(tmp_path, None).images() == []


@pytest.mark.parametrize("value", [3, [None], [""], [{"bytes": None, "path": None}], [["a"]]])
def test_what_is_no_image(tmp_path: Path, value: object) -> None:
    with pytest.raises(SampleError, match="image 0 is neither bytes nor a path"):
        row(tmp_path, value).images()


def test_paths_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "dir").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    for name in ("../secret", "x/../../secret", "link", "dir/secret", str(tmp_path / "secret")):
        with pytest.raises(SampleError, match="folder"):
            read_inside(folder, name)
    for name in ("missing", ".", "loop", "a\0b", "pipe", "n" * 5000):
        with pytest.raises(SampleError):
            read_inside(folder, name)


@pytest.mark.parametrize("skip", [0, 1, 6, 7, 13, 24])
def test_parquet_rows_and_where_to_go_on(tmp_path: Path, skip: int) -> None:
    path = toys.write_parquet(tmp_path / "a.parquet", toys.chat_rows(24), group=7)
    assert parquet.count(path) == 24
    found = list(parquet.rows(path, {}, False, 100, skip))
    assert [r.number for r in found] == list(range(100 + skip, 124))
    assert [r.origin for r in found] == [f"a.parquet:{n}" for n in range(skip, 24)]
    for r in found:
        expected = toys.chat_rows(1, r.number - 100)[0]
        assert r.messages() == expected["messages"] and r.images() == expected["images"]


def test_parquet_with_nested_messages_and_other_column_names(tmp_path: Path) -> None:
    message = {"role": "user", "content": "Olá"}
    table = pa.table({"conversa": [[message]], "foto": [b"png"], "outra": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = {"messages": "conversa", "images": "foto"}
    (found,) = parquet.rows(tmp_path / "a.parquet", columns, False, 0)
    assert found.messages() == [message] and found.images() == [b"png"]
    with pytest.raises(SourceError, match=r"no column messages \(it has conversa, foto, outra\)"):
        next(parquet.rows(tmp_path / "a.parquet", {}, False, 0))
    with pytest.raises(SourceError, match="no column imagem"):
        next(parquet.rows(tmp_path / "a.parquet", {**columns, "images": "imagem"}, False, 0))
    with pytest.raises(SourceError, match="no column chosen, rejected"):
        next(parquet.rows(tmp_path / "a.parquet", columns, True, 0))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = toys.write_parquet(tmp_path / "a.parquet", toys.chat_rows(24), group=7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(SourceError, match=r"a\.parquet is not readable as Parquet"):
        parquet.count(path)
    path.write_bytes(whole[:100] + bytes(len(whole) - 2000) + whole[-1900:])
    with pytest.raises(SourceError, match=r"a\.parquet is not readable as Parquet"):
        list(parquet.rows(path, {}, False, 0))


def test_messages_that_are_not_json(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        with pytest.raises(SampleError, match="not JSON"):
            SourceRow(0, "f:0", tmp_path, {"messages": text}).messages()


def test_jsonl_bad_lines_are_bad_rows(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Olá"}]}
    lines = [good, b"{", b"", b"\xff\xfe", b"[1]", b"[" * 100_000, b"  ", good]
    path = toys.write_jsonl(tmp_path / "a.jsonl", lines)
    assert jsonl.count(path) == 8
    found = list(jsonl.rows(path, {}, False, 10))
    assert [r.number for r in found] == [10, 11, 13, 14, 15, 17]
    assert [r.origin for r in found][:3] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    problems = [r.problem for r in found]
    assert problems[0] is None and problems[5] is None and None not in problems[1:5]
    assert "not UTF-8" in str(problems[2]) and "not a JSON object" in str(problems[3])
    assert [r.number for r in jsonl.rows(path, {}, False, 10, skip=4)] == [14, 15, 17]


def test_jsonl_last_line_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": []}\n{"messages": []}')
    assert jsonl.count(tmp_path / "a.jsonl") == 2
    assert len(list(jsonl.rows(tmp_path / "a.jsonl", {}, False, 0))) == 2
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert jsonl.count(tmp_path / "b.jsonl") == 0


def test_jsonl_lines_too_long_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    long = json.dumps({"messages": "x" * 500}).encode()
    path = toys.write_jsonl(tmp_path / "a.jsonl", [long, {"messages": []}, long])
    found = list(jsonl.rows(path, {}, False, 0))
    assert [r.number for r in found] == [0, 1, 2]
    assert [r.problem is None for r in found] == [False, True, False]
    assert "over 100 bytes" in str(found[0].problem)


def test_jsonl_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        jsonl.count(tmp_path / "none.jsonl")
