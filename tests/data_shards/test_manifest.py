"""Reading checks of the manifest: every damage is found and named."""

import shutil
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
    content_digest,
    read_manifest,
    write_manifest,
)
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
    """As a faulty program would: whole, with a matching digest."""
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


def test_every_flipped_bit_is_found(copy: Path) -> None:
    whole = copy.read_bytes()
    generator = np.random.default_rng(0)
    reference = read_manifest(copy)
    harmless = 0
    for position in generator.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(generator.integers(8))
        copy.write_bytes(bytes(damaged))
        try:
            found = read_manifest(copy)
        except ManifestError as error:
            assert "manifest.parquet" in str(error) and "make shards" in str(error)
        else:
            # Bits that mean nothing: statistics, the writer's name, page headers' slack.
            harmless += 1
            assert found.table.equals(reference.table)
            assert np.array_equal(found.tokens, reference.tokens)
            assert np.array_equal(found.json_span, reference.json_span)
    assert harmless < 75


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_truncation(copy: Path, share: float) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ManifestError, match="not a readable Parquet file"):
        read_manifest(copy)


def test_another_parquet_file(copy: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), copy)
    with pytest.raises(ManifestError, match="not a manifest"):
        read_manifest(copy)


def test_edited_rows_do_not_match_the_digest(copy: Path) -> None:
    table = pq.read_table(copy)
    index = table.column_names.index("tokens")
    tokens = pa.array([value + 1 for value in table["tokens"].to_pylist()], pa.int32())
    edited = table.set_column(index, "tokens", tokens).replace_schema_metadata(
        table.schema.metadata
    )
    pq.write_table(edited, copy)
    with pytest.raises(ManifestError, match="does not match its own digest"):
        read_manifest(copy)


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("shard", 3, 99, r"row 3 \(000000003\) names a shard"),
        ("json_offset", 5, 1 << 40, r"row 5 \(000000005\) has a JSON member outside"),
        ("json_size", 5, 0, "JSON member outside"),
        ("tokens_rejected", 2, 7, "row 2 .* is a pair among samples"),
        ("target_tokens", 4, 0, "row 4 .* no token to train on"),
    ],
)
def test_rows_that_cannot_be(copy: Path, column: str, row: int, value: object, words: str) -> None:
    info = read_manifest(copy).info
    rewrite(copy, replaced(rows_of(copy), column, row, value), info)
    with pytest.raises(ManifestError, match=words):
        read_manifest(copy)


def test_an_image_outside_its_shard_names_its_sample(copy: Path) -> None:
    info, rows = read_manifest(copy).info, rows_of(copy)
    images = rows["images"][7].as_py()
    images[1]["offset"] = 1 << 40
    rewrite(copy, replaced(rows, "images", 7, images), info)
    with pytest.raises(ManifestError, match="row 7 .* has an image outside its shard"):
        read_manifest(copy)


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


def test_digest_ignores_how_parquet_stores(world: World) -> None:
    manifest = world.manifests["chats"]
    rows = rows_of(manifest.path)
    pieces = pa.concat_tables([rows.slice(0, 5), rows.slice(5)])
    assert content_digest(pieces.cast(SCHEMA), manifest.info) == manifest.info.digest
    shuffled = rows.take(list(reversed(range(len(rows)))))
    assert content_digest(shuffled, manifest.info) != manifest.info.digest


def test_reading_twice_gives_equal_manifests(world: World) -> None:
    first: Manifest = world.manifests["chats"]
    second = read_manifest(first.path)
    assert first.info == second.info and np.array_equal(first.image_span, second.image_span)
