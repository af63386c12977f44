"""Every format, cut into blocks of every size: the same rows, whatever came before is not read."""

import json
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from conf.schema.data import SourceConfig
from data_shards.layouts import to_fields
from data_shards.sample import parse_sample
from data_shards.sources import Source, SourceError, SourceRow, json_list, jsonl, open_source
from data_shards.writer import ShardWriter
from tests.data_shards import toys

COUNTS = (7, 0, 1, 12)  # rows of each file


def records(first: int, count: int) -> list[dict[str, Any]]:
    """Texts with every kind of character that a scanner could trip over."""
    texts = ['a "quoted" one', "brackets ][}{ and , commas", "back\\slashes \\\\", "ção\n\t", ""]
    return [
        {"messages": [{"role": "user", "content": texts[n % 5] + "x" * (n * 7 % 50)}], "n": n}
        for n in range(first, first + count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) for row in rows)
    path.write_text(text, encoding="utf-8")  # without a last line feed


def write_list(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(
        json.dumps(rows, ensure_ascii=False, indent=len(rows) % 3 or None), encoding="utf-8"
    )


def write_tar(path: Path, rows: list[dict[str, Any]]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for row in rows:
            writer.write({"__key__": f"{row['n']:04d}", "json": row, "0.png": b"png"})


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    column = pa.array([json.dumps(row["messages"]) for row in rows], pa.string())
    pq.write_table(pa.table({"messages": column}), path, row_group_size=5)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_list,
    "webdataset": write_tar,
    "parquet": write_parquet,
}


def source(folder: Path, form: str) -> Source:
    first = 0
    for number, count in enumerate(COUNTS):
        path = folder / f"part{number % 2}" / f"{number}.{form}"
        path.parent.mkdir(exist_ok=True)
        WRITERS[form](path, records(first, count))
        first += count
    return open_source("s", SourceConfig(str(folder / "*" / f"*.{form}"), format=form))


def in_order() -> list[dict[str, Any]]:
    """Records in the order of the sorted file names: parts 0/0, 0/2, 1/1, 1/3."""
    return [*records(0, 7), *records(7, 1), *records(8, 12)]


@pytest.mark.parametrize("form", list(WRITERS))
def test_blocks_give_the_same_rows_whatever_their_size(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_CHUNK", 37)
    monkeypatch.setattr(json_list, "_CHUNK", 37)
    found = source(tmp_path, form)
    names = [path.relative_to(tmp_path).as_posix() for path in found.files]
    assert names == [f"part{p}/{n}.{form}" for p, n in ((0, 0), (0, 2), (1, 1), (1, 3))]
    expected = in_order()
    for size in (1, 2, 3, 5, 7, 8, 19, 20, 1000):
        blocks = found.blocks(size)
        assert found.blocks(size) is blocks
        assert [block.number for block in blocks] == list(range(-(-20 // size)))
        assert [block.first_number for block in blocks] == list(range(0, 20, size))
        assert sum(block.rows for block in blocks) == 20
        rows: list[SourceRow] = []
        for block in reversed(blocks):  # none needs another to be read before
            rows = [*found.rows(block), *rows]
        assert [row.number for row in rows] == list(range(20))
        assert [row.problem for row in rows] == [None] * 20
        for row, record in zip(rows, expected, strict=True):
            messages = row.values["messages"]
            messages = json.loads(messages) if form == "parquet" else messages
            assert messages == record["messages"]
    places = {
        "jsonl": ("part0/0.jsonl:1", "part1/3.jsonl:12"),
        "json": ("part0/0.json:0", "part1/3.json:11"),
        "parquet": ("part0/0.parquet:0", "part1/3.parquet:11"),
        "webdataset": ("part0/0.webdataset:0000", "part1/3.webdataset:0019"),
    }
    assert (rows[0].origin, rows[-1].origin) == places[form]


def test_an_empty_source_has_no_blocks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert open_source("s", SourceConfig(str(tmp_path / "a.jsonl"), "jsonl")).blocks(10) == []


@pytest.mark.parametrize("form", list(WRITERS))
def test_damaged_files_are_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"0.{form}"
    if form == "jsonl":
        path.symlink_to(tmp_path)  # nothing damages lines as a whole
        with pytest.raises(SourceError, match="matches no file"):
            open_source("s", SourceConfig(str(path), form))
        return
    WRITERS[form](path, records(0, 12))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=rf"0\.{form}"):
        open_source("s", SourceConfig(str(path), form)).blocks(4)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    with pytest.raises(SourceError, match=r"data\.sources\.s\.format='csv' is none of"):
        open_source("s", SourceConfig(str(tmp_path / "a.jsonl"), "csv"))
    config = SourceConfig(str(tmp_path / "a.jsonl"), "jsonl", layout="texts", preference=True)
    with pytest.raises(SourceError, match="needs chosen and rejected"):
        open_source("s", config)


@pytest.mark.parametrize("name", [b"a\xff.jsonl", b"a\n.jsonl"])
def test_names_that_cannot_be_printed(tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_bytes(b"{}")
    with pytest.raises(SourceError, match="is not printable; rename it"):
        open_source("s", SourceConfig(str(tmp_path / "*.jsonl"), "jsonl"))


def test_webdataset_members(tmp_path: Path) -> None:
    """img2dataset's shards (jpg, txt, json), and members that are no data or not readable."""
    path = tmp_path / "a.tar"
    members = [
        ("000.jpg", b"jpg"),
        ("000.txt", "Um elétrico.".encode()),
        ("000.json", b'{"caption": "Um el\\u00e9trico.", "url": "u"}'),
        ("001.json", b"{"),
        ("002.txt", b"\xff"),
        ("003.10.png", b"ten"),
        ("003.9.png", b"nine"),
        ("003.npy", b"skipped"),
    ]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    found = open_source("s", SourceConfig(str(path), "webdataset"))
    (block,) = found.blocks(10)
    rows = list(found.rows(block))
    assert rows[0].values == {"txt": "Um elétrico.", "caption": "Um elétrico.", "url": "u"}
    assert rows[0].attached == [("000.jpg", b"jpg")]
    assert "001.json: not JSON" in str(rows[1].problem)
    assert "002.txt is not UTF-8" in str(rows[2].problem)
    assert [name for name, _ in rows[3].attached] == ["003.10.png", "003.9.png"]


def test_our_own_shards_are_a_source(tmp_path: Path) -> None:
    """A shard read again gives the samples it was made of."""
    rows = [*toys.chat_rows(4), *toys.pair_rows(3)]
    for preference, part in ((False, rows[:4]), (True, rows[4:])):
        config = SourceConfig(str(tmp_path / f"{preference}.tar"), "webdataset")
        config.preference = preference
        samples = []
        with ShardWriter(Path(config.input)) as writer:
            for number, row in enumerate(part):
                sample = parse_sample(
                    row,
                    row["images"],
                    key=f"{number:09d}",
                    source="a",
                    licence="MIT",
                    origin="f:0",
                    preference=preference,
                )
                images = [(f"{n}.png", data) for n, data in enumerate(sample.images)]
                writer.add(sample.key, [("json", sample.to_json()), *images])
                samples.append(sample)
            writer.close()
        found = open_source("s", config)
        again = [to_fields(row, config) for block in found.blocks(2) for row in found.rows(block)]
        for sample, fields in zip(samples, again, strict=True):
            assert fields.messages == list(sample.messages) and fields.licence == "MIT"
            assert tuple(fields.images) == sample.images
            assert (fields.chosen, fields.rejected) == (sample.chosen, sample.rejected)
