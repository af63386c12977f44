"""Parquet: damaged files are named, bad texts are bad rows, only what is needed is read."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema.data import SourceConfig
from data_shards.sources import Source, SourceError, SourceRow, open_source, parquet
from tests.data_shards import toys


def source(path: Path, **config: object) -> Source:
    return open_source("s", SourceConfig(str(path), **config))  # type: ignore[arg-type]


def rows(found: Source, block_rows: int = 100) -> list[SourceRow]:
    return [row for block in found.blocks(block_rows) for row in found.rows(block)]


def test_damaged_files(tmp_path: Path) -> None:
    path = toys.write_parquet(tmp_path / "a.parquet", toys.chat_rows(24), group=7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(SourceError, match=r"a\.parquet is not readable as Parquet"):
        source(path).blocks(10)
    path.write_bytes(whole[:100] + bytes(len(whole) - 2000) + whole[-1900:])
    with pytest.raises(SourceError, match=r"a\.parquet is not readable as Parquet"):
        rows(source(path))
    path.write_bytes(whole)
    found = source(path)
    found.blocks(100)
    toys.write_parquet(path, toys.chat_rows(3))
    with pytest.raises(SourceError, match="became shorter while it was read"):
        rows(found)


def test_texts_that_are_not_utf8_are_bad_rows(tmp_path: Path) -> None:
    texts = [f'[{{"role": "user", "content": "{n}"}}]'.encode() for n in range(40)]
    texts[21] = b"\xff\xfe"
    column = pa.Array.from_buffers(
        pa.string(), 40, pa.array(texts, pa.binary()).buffers(), null_count=0
    )
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    found = rows(source(tmp_path / "a.parquet"))
    assert [row.number for row in found] == list(range(40))
    assert [row.number for row in found if row.problem] == [21]
    assert "a text is not UTF-8" in str(found[21].problem)
    assert found[22].values["messages"] == texts[22].decode()


def test_only_the_columns_that_could_be_needed_are_read(tmp_path: Path) -> None:
    table = pa.table({"messages": ["[]"], "embedding": [[0.5] * 4], "data": [{"licence": "MIT"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    (row,) = rows(source(tmp_path / "a.parquet"))
    assert set(row.values) == {"messages"}
    (row,) = rows(source(tmp_path / "a.parquet", columns={"licence": "data.licence"}))
    assert row.values == {"messages": "[]", "data": {"licence": "MIT"}}


def test_of_structs_only_the_parts_that_are_named(tmp_path: Path) -> None:
    never = pa.array([-(2**62), 0], pa.timestamp("us"))  # before the year 1
    turns = pa.array([[{"from": "human", "value": "a"}]] * 2)
    data = pa.StructArray.from_arrays([turns, never], ["turns", "when"])
    pq.write_table(pa.table({"data": data, "licence": ["MIT", "MIT"]}), tmp_path / "a.parquet")
    columns = {"messages": "data.turns"}
    for row in rows(source(tmp_path / "a.parquet", columns=columns)):
        assert row.values["data"] == {"turns": [{"from": "human", "value": "a"}]}
    first, second = rows(source(tmp_path / "a.parquet", columns={**columns, "licence": "data"}))
    assert "a value cannot be read" in str(first.problem) and second.problem is None


def test_columns_that_fit_no_layout(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), tmp_path / "a.parquet")
    expected = r"data\.sources\.s: .*a\.parquet: no layout fits the columns id, text: name them"
    with pytest.raises(SourceError, match=expected):
        source(tmp_path / "a.parquet").blocks(10)


def test_columns_that_unpack_to_far_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = '[{"role": "user", "content": "' + "a" * 100_000 + '"}]'
    table = pa.table({"messages": [chat + " " * n for n in range(50)], "other": ["x"] * 50})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    found = source(tmp_path / "a.parquet")
    assert len(rows(found)) == 50
    monkeypatch.setattr(parquet, "_BOMB_BYTES", 1 << 20)
    expected = r"a\.parquet: column messages of row group 0 unpacks \d+ bytes to \d+; take the file"
    with pytest.raises(SourceError, match=expected):
        rows(found)
