"""The manifest: written in parts, opened by mapping, every damage found and named."""

import hashlib
import json
import shutil
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.manifest import (
    SCHEMA,
    Manifest,
    ManifestError,
    ManifestInfo,
    ManifestWriter,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from data_shards.manifest_facts import content_digest
from data_shards.manifest_index import COLUMNS, read_sealed, release, write_sealed
from data_shards.writer import ShardInfo
from tests.data_shards import toys
from tests.data_shards.conftest import World


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    source = world.manifests["chats"].path.parent
    shutil.copytree(source, tmp_path / "chats")
    return tmp_path / "chats" / "manifest.parquet"


def rows_of(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None)


def rewrite(path: Path, rows: pa.Table, info: ManifestInfo) -> None:
    """As a faulty program would: whole, with matching digests."""
    write_manifest(path, rows, info)


def replaced(rows: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = rows[name].to_pylist()
    values[row] = value
    index = rows.column_names.index(name)
    return rows.set_column(index, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type))


def test_columns(world: World) -> None:
    manifest = world.manifests["chats"]
    assert len(manifest) == 24 and manifest.info.name == "chats" and not manifest.info.preference
    assert manifest.info.tokenizer_digest == world.tokenizer.digest()
    counts = np.diff(manifest.first_image)
    assert counts.tolist() == [1, 1, 0, 2] * 6
    for row in range(24):
        images = slice(manifest.first_image[row], manifest.first_image[row + 1])
        tiles = [toys.GEOMETRY.n_tiles(*hw) for hw in manifest.image_hw[images].tolist()]
        assert manifest.image_tiles[images].tolist() == tiles
        assert manifest.tiles[row] == sum(tiles)
    assert set(manifest.table["licence"].to_pylist()) == {"CC-BY-4.0"}
    assert (manifest.tokens_rejected == 0).all()
    pairs = world.manifests["pairs"]
    assert (pairs.tokens_rejected > 0).all() and pairs.info.preference


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.parquet does not exist; build"):
        read_manifest(tmp_path / "manifest.parquet")


def same(first: Manifest, second: Manifest) -> bool:
    return first.info == second.info and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in COLUMNS
    )


def test_every_flipped_bit_is_found(copy: Path) -> None:
    """In the Parquet file and in every file of the index; the Parquet file has bits that mean
    nothing (statistics, the writer's name, slack), which then change nothing."""
    reference = verify_manifest(copy)
    labels = reference.table
    generator = np.random.default_rng(0)
    for path in (copy, *sorted((copy.parent / "index").iterdir())):
        whole = path.read_bytes()
        harmless = 0
        tries = 60 if path == copy else 10
        for position in generator.integers(0, len(whole), tries):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(damaged))
            try:
                found = verify_manifest(copy)
            except ManifestError as error:
                assert str(copy.parent) in str(error) and "make shards" in str(error)
            else:
                harmless += 1
                assert path == copy and same(found, reference) and found.table.equals(labels)
        assert harmless < 30
        path.write_bytes(whole)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("name", ["manifest.parquet", "index/index.json", "index/tokens.npy"])
def test_truncation_is_found_on_opening(copy: Path, name: str, share: float) -> None:
    path = copy.parent / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ManifestError, match=f"{path.name}.* (bytes|damaged|hold).*make shards"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["index/index.json", "index/image_hw.npy"])
def test_a_missing_file_of_the_index(copy: Path, name: str) -> None:
    (copy.parent / name).unlink()
    with pytest.raises(ManifestError, match=f"{name.split('/')[1]}.*make shards"):
        read_manifest(copy)


def test_another_parquet_file(copy: Path) -> None:
    size = copy.stat().st_size
    pq.write_table(pa.table({"a": [1]}), copy)
    with pytest.raises(ManifestError, match=f"bytes, its index says {size}"):
        read_manifest(copy)
    index = copy.parent / "index" / "index.json"
    write_sealed(index, {**read_sealed(index), "parquet_size": copy.stat().st_size})
    with pytest.raises(ManifestError, match="does not have a manifest's columns"):
        verify_manifest(copy)


def test_a_changed_value_is_found_when_planning_would_begin(copy: Path) -> None:
    manifest = read_manifest(copy)
    manifest.verify_index()
    path = copy.parent / "index" / "tiles.npy"
    tiles = np.lib.format.open_memmap(path, mode="r+")  # NumPy's own reader of the format
    assert tiles.dtype == np.int32 and tiles.shape == (24,)
    tiles[3] += 1
    tiles.flush()
    with pytest.raises(ManifestError, match=r"tiles\.npy does not match its digest"):
        read_manifest(copy).verify_index()


def forge(path: Path, column: str, row: int, value: object) -> None:
    """Change a value of the index, and with it every digest that stands in the index."""
    file, index = path.parent / "index" / f"{column}.npy", path.parent / "index" / "index.json"
    values = np.lib.format.open_memmap(file, mode="r+")
    values[row] = value
    values.flush()
    sealed = read_sealed(index)
    sealed["columns"][column]["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    info = ManifestInfo.from_json(sealed["info"])
    digest = content_digest(info, sealed["rows"], sealed["columns"])
    sealed["info"]["digest"] = digest
    write_sealed(index, sealed)


def test_a_forged_index_differs_from_the_parquet_file_and_in_digest(copy: Path) -> None:
    before = read_manifest(copy)
    forge(copy, "tokens", 3, before.tokens[3] + 1)
    forged = read_manifest(copy)
    forged.verify_index()
    assert forged.info.digest != before.info.digest, "so its plan is another"
    with pytest.raises(ManifestError, match="differ in their facts"):
        verify_manifest(copy)
    # Facts forged in the Parquet file as well:
    table = pq.read_table(copy)
    facts = json.dumps(asdict(forged.info)).encode()
    pq.write_table(table.replace_schema_metadata({b"amalia_vl": facts}), copy)
    index = copy.parent / "index" / "index.json"
    write_sealed(index, {**read_sealed(index), "parquet_size": copy.stat().st_size})
    with pytest.raises(ManifestError, match="its index has other tokens"):
        verify_manifest(copy)


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("shard", 3, 99, r"row 3 \(000000003\) names a shard"),
        ("json_span", 5, (1 << 40, 9), r"row 5 \(000000005\) has a JSON member outside"),
        ("json_span", 5, (9, (1 << 63) - 2), "JSON member outside"),
        ("json_span", 5, (0, 0), "JSON member outside"),
        ("image_span", 0, (-1, 7), "row 0 .* has an image outside its shard"),
        ("tiles", 4, 99, "row 4 .* has another sum of tiles"),
        ("shard", 23, 0, r"row 23 \(000000023\) stands behind a row of a later shard"),
        ("shard", 0, 1, r"row 1 \(000000001\) stands behind a row of a later shard"),
        ("first_image", 5, 0, r"row 4 \(000000004\) has images that end before they begin"),
        ("tokens_rejected", 2, 7, "row 2 .* is a pair among samples"),
        ("target_tokens", 4, 0, "row 4 .* no token to train on"),
    ],
)
def test_rows_that_cannot_be(copy: Path, column: str, row: int, value: object, words: str) -> None:
    forge(copy, column, row, value)
    with pytest.raises(ManifestError, match=words):
        read_manifest(copy).verify_index()


def test_rows_are_checked_in_chunks(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.manifest_index.CHUNK", 5)
    manifest = read_manifest(copy)
    manifest.verify_index()
    first = int(np.flatnonzero(np.diff(manifest.shard))[0]) + 1
    for row in (5, 10, 20):  # the first of a chunk
        forge(copy, "shard", row, manifest.shard[row - 1] - 1 if row > first else -1)
        with pytest.raises(ManifestError, match=f"row {row} .*(stands behind|names a shard)"):
            read_manifest(copy).verify_index()
        forge(copy, "shard", row, manifest.shard[row - 1])


def test_such_rows_are_not_written(copy: Path) -> None:
    info, rows = read_manifest(copy).info, rows_of(copy)
    images = rows["images"][7].as_py()
    images[1]["offset"] = 1 << 40
    before = copy.read_bytes()
    for bad, words in (
        (replaced(rows, "images", 7, images), "row 7 .* has an image outside its shard"),
        (replaced(rows, "licence", 2, None), "empty cells"),
        (rows.slice(0, 0), "would list no sample"),
    ):
        with pytest.raises(ManifestError, match=words):
            write_manifest(copy, bad, info)
        assert copy.read_bytes() == before, "what was there stays"
        verify_manifest(copy)
    assert sorted(p.name for p in copy.parent.iterdir() if "manifest" in p.name) == [copy.name]


def test_bytes_do_not_depend_on_the_parts(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.manifest_writer.ROW_GROUP", 10)
    info, rows = read_manifest(copy).info, rows_of(copy)
    folders = []
    for cuts in ([24], [1, 2, 15, 6], [11, 13], [0, 24]):
        folder = tmp_path / str(cuts)
        folder.mkdir()
        first = 0
        with ManifestWriter(folder) as writer:
            for count in cuts:
                writer.add(rows.slice(first, count))
                first += count
            written = writer.close(info)
        assert written.digest == info.digest, "nor does it depend on Parquet's row groups"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        folders.append([(path.relative_to(folder), path.read_bytes()) for path in files])
        read = verify_manifest(folder / "manifest.parquet")
        assert read.table.equals(read_manifest(copy).table)
        assert read.read(["tokens"], 7, 22)["tokens"].to_pylist() == read.tokens[7:22].tolist()
    assert all(folder == folders[0] for folder in folders[1:])
    assert len(folders[0]) == 2 + len(COLUMNS)
    with ManifestWriter(tmp_path / "[24]") as writer:
        writer.add(rows.take([1, 0, *range(2, 24)]))
        assert writer.close(info).digest != info.digest


def test_labels_are_counted_and_facts_kept(copy: Path) -> None:
    info, rows = read_manifest(copy).info, rows_of(copy)
    layout = {"layout": "texts", "columns": {"images": "pictures"}}
    changed = replace(info, shards_root="/elsewhere", layout=layout, licences={})
    written = write_manifest(copy, replaced(rows, "licence", 2, "MIT"), changed)
    assert written.licences == {"CC-BY-4.0": 23, "MIT": 1}
    read = read_manifest(copy)
    assert read.info == written and read.info.layout == layout
    assert read.shards_directory == Path("/elsewhere")
    assert sum(read.info.languages.values()) == sum(read.info.varieties.values()) == 24


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/../../b.tar"])
def test_shards_outside_their_folder(copy: Path, name: str) -> None:
    info, rows = read_manifest(copy).info, rows_of(copy)
    shards = (ShardInfo(name, *astuple(info.shards[0])[1:]), *info.shards[1:])
    write_manifest(copy, rows, replace(info, shards=shards))
    with pytest.raises(ManifestError, match="lies outside the shards' folder"):
        read_manifest(copy)


def test_text_alone(copy: Path) -> None:
    """No image at all: empty columns cannot be mapped."""
    info, rows = read_manifest(copy).info, rows_of(copy)
    mask = np.diff(read_manifest(copy).first_image) == 0
    write_manifest(copy, rows.filter(pa.array(mask)), info)
    manifest = verify_manifest(copy)
    assert len(manifest) == 6 and manifest.image_span.shape == (0, 2)
    assert [manifest.key(row) for row in range(2)] == ["000000002", "000000006"]


def test_shards_missing_or_short(copy: Path) -> None:
    manifest = read_manifest(copy)
    manifest.check_shards()
    shard = manifest.shards_directory / manifest.info.shards[1].name
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ManifestError, match=f"{shard.name} has .* bytes, its manifest says"):
        manifest.check_shards()
    shard.unlink()
    with pytest.raises(ManifestError, match=f"{shard.name} is missing; restore"):
        manifest.check_shards()


def test_environment(world: World) -> None:
    manifest = world.manifests["chats"]
    good = (manifest.info.tokenizer_digest, manifest.info.geometry_digest)
    manifest.check_environment(*good)
    with pytest.raises(ManifestError, match=r"another tokenizer .* set data\.tokenizer"):
        manifest.check_environment("f" * 64, good[1])
    with pytest.raises(ManifestError, match="another tiling .* set model"):
        manifest.check_environment(good[0], "f" * 64)


def test_values_are_mapped_not_read(world: World) -> None:
    manifest = world.manifests["chats"]
    for name in COLUMNS:
        values = getattr(manifest, name)
        assert not values.flags.writeable and type(values) is np.ndarray
        before = values.copy()
        release([values])
        assert np.array_equal(values, before), "read again"
    assert same(manifest, read_manifest(manifest.path))
