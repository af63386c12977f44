"""Damage to shards, manifests and indexes: all of it is found and named, the samples it touches are
masked and counted, and everything else is delivered bit for bit."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conf.schema.data import SourceConfig
from data_shards import reader, shard_check
from data_shards.batch import PackedBatch
from data_shards.build import build_dataset
from data_shards.loader import Loader, LoaderError
from data_shards.manifest import (
    Manifest,
    ManifestError,
    read_manifest,
    write_manifest,
)
from data_shards.plan import Plan, sequential_plan
from data_shards.shard_check import Checks
from data_shards.validate import is_damaged, validate
from tests.data_shards import toys
from tests.data_shards.conftest import World
from tests.data_shards.damage import DAMAGES, Bytes, places, swap_shards, zero_a_header
from tests.data_shards.loader_process import packs_of
from tests.data_shards.test_in_place import chats, write_archives
from tests.data_shards.test_reader import copied

CHECKS = Checks(1_000_000)
EACH = 12  # damages of each kind


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reader, shard_check):
        monkeypatch.setattr(module, "_WAIT", 0.0)


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Manifest:
    """Twelve samples in several shards, to be damaged."""
    manifest = copied(world, "more", tmp_path)
    assert len(manifest.info.shards) >= 3
    return manifest


def one_by_one(world: World, manifest: Manifest) -> Plan:
    """Every sample in a pack of its own."""
    stage = toys.stage(packing=False, global_batch_size=1)
    data = dataclasses.replace(world.data, mix={stage.name: {"more": 1.0}})
    return sequential_plan({"more": manifest}, data, stage)


def opened(world: World, manifest: Manifest, plan: Plan, **options: Any) -> Loader:
    return Loader(plan, {"more": manifest}, world.tokenizer, toys.GEOMETRY, **options)


def delivered(loader: Loader) -> dict[int, PackedBatch]:
    return {int(b.sample_ids[0, 1]): b for _, batches in loader.batches() for b in batches}


def digests(batches: dict[int, PackedBatch]) -> dict[int, str]:
    return {row: next(packs_of(batch, 512)) for row, batch in batches.items()}


def test_every_damage_is_found(world: World, copy: Manifest) -> None:
    sound, plan = Bytes(copy), one_by_one(world, copy)
    expected = digests(delivered(opened(world, copy, plan, workers=0)))
    assert len(expected) == len(copy) == 12
    seen: Counter[str] = Counter()
    for number, damage in enumerate(DAMAGES * EACH):
        loader = opened(world, copy, plan, workers=number % 3)
        damage(Random(number), sound.members)
        contents, samples, shards = sound.changed()
        where = f"{damage.__name__} {number}"
        found = delivered(loader)

        masked = {row: reason for (_, row), reason in loader.masked.items()}
        assert set(masked) == contents, where
        assert loader.n_masked == len(contents) == sum(b.n_masked for b in found.values())
        for row, reason in masked.items():
            shard = copy.info.shards[copy.shard[row]].name
            assert f"{shard}: sample {copy.key(row)} (row {row}): " in reason, where
            batch = found[row]
            assert not batch.loss_mask_T.any() and not batch.tiles_NCHW.any()
            assert not len(batch.image_rows_P)
        whole = {row: digest for row, digest in digests(found).items() if row not in contents}
        assert whole == {row: expected[row] for row in expected if row not in contents}, where

        report = validate(copy, 0, None, CHECKS)
        named = {entry["shard"] for entry in report["bad"] + report["bad_shards"]}
        assert {entry["row"] for entry in report["bad"]} == samples, where
        assert named == shards and is_damaged(report) == bool(shards), where
        if any(
            not (path := copy.shards_directory / shard.name).is_file()
            or path.stat().st_size != shard.size
            for shard in copy.info.shards
        ):  # a run would not even begin
            with pytest.raises(ManifestError, match="|".join(shards)):
                opened(world, copy, plan, workers=0)
        kind = "contents" if contents else "around them" if samples else "elsewhere"
        seen[kind if shards else "nothing"] += 1
        sound.restore()
    assert not is_damaged(validate(copy, 0, None, CHECKS))
    assert seen["contents"] > len(DAMAGES * EACH) / 2 and seen["around them"] > 20
    assert 0 < seen["elsewhere"] and seen["nothing"] < 20  # zeros written over zeros


def test_archives_left_in_place(world: World, tmp_path: Path) -> None:
    """What training reads of them is guarded as in shards of ours. Their headers must be whole;
    names and padding, which say nothing that is read, are not on record."""
    pattern = write_archives(tmp_path / "theirs", [chats(5), chats(4, 40), chats(3, 80)])
    source = SourceConfig(str(pattern), format="webdataset", in_place=True)
    data = dataclasses.replace(world.data, root=str(tmp_path / "built"))
    manifest = build_dataset("more", source, data, toys.GEOMETRY, world.tokenizer.digest())
    assert manifest.shards_directory == pattern.parent and manifest.info.layout is not None
    sound, plan = Bytes(manifest), one_by_one(world, manifest)
    expected = digests(delivered(opened(world, manifest, plan, workers=0)))
    assert not is_damaged(validate(manifest, 0, None, CHECKS)) and len(expected) == 12
    unseen = 0
    for number, damage in enumerate(DAMAGES * 3):
        loader = opened(world, manifest, plan, workers=0)
        damage(Random(number), sound.members)
        contents, _, shards = sound.changed()
        where = f"{damage.__name__} {number}"
        found = digests(delivered(loader))
        assert {row for _, row in loader.masked} == contents, where
        assert all(found[row] == expected[row] for row in expected if row not in contents), where
        report = validate(manifest, 0, None, CHECKS)
        named = {entry["shard"] for entry in report["bad"] + report["bad_shards"]}
        assert contents <= {entry["row"] for entry in report["bad"]} and named <= shards, where
        assert named or not contents and damage is not zero_a_header, where
        unseen += not named
        sound.restore()
    assert unseen < len(DAMAGES)


def test_what_a_reader_by_offsets_does_not_look_at(world: World, copy: Manifest) -> None:
    """A tar header between members, padding, the end: training needs none of them and goes on
    with every sample; validation finds each. tarfile and webdataset would drop the samples."""
    sound, plan = Bytes(copy), one_by_one(world, copy)
    expected = digests(delivered(opened(world, copy, plan, workers=0)))
    for number in range(3):
        zero_a_header(Random(number), sound.members)
    contents, samples, _ = sound.changed()
    loader = opened(world, copy, plan, workers=0)
    assert digests(delivered(loader)) == expected and loader.n_masked == len(contents) == 0
    report = validate(copy, 0, None, CHECKS)
    assert {entry["row"] for entry in report["bad"]} == samples and len(samples) >= 2
    assert all("the tar header of its" in entry["cause"] for entry in report["bad"])


def test_goes_on_until_the_limit(world: World, copy: Manifest) -> None:
    """Two shards under each other's name while training reads them."""
    sound, plan = Bytes(copy), one_by_one(world, copy)
    loaders = [opened(world, copy, plan, workers=1, max_masked=most) for most in (12, 2)]
    swap_shards(Random(1), sound.members)
    contents, _, _ = sound.changed()
    assert len(contents) > 2
    assert len(delivered(loaders[0])) == 12 and loaders[0].n_masked == len(contents)
    steps: list[Any] = []
    with pytest.raises(LoaderError, match=r"more than data.max_masked=2 .*the last: .*\.tar: sam"):
        steps.extend(loaders[1].batches())
    assert len(steps) == sorted(contents)[2], "until the third bad one"


def test_damaged_manifests_and_indexes(world: World, copy: Manifest) -> None:
    """Nothing is ever delivered that differs without a word, and validation finds whatever changes
    a value. Of a Parquet file, some bytes (statistics, who wrote it) mean nothing."""
    folder, plan = copy.path.parent, one_by_one(world, copy)
    expected = digests(delivered(opened(world, copy, plan, workers=0)))
    files = sorted(
        path for path in folder.rglob("*") if path.suffix in (".npy", ".json", ".parquet")
    )
    files = [path for path in files if path == copy.path or path.parent.name == "index"]
    assert len(files) > 12
    table = pq.read_table(copy.path)
    outcomes: Counter[str] = Counter()
    for number, path in enumerate(files * 8):
        sound, chance = path.read_bytes(), Random(number)
        kind = number // len(files) % 6
        data = bytearray(sound)
        if kind < 3 and data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 3:
            del data[chance.randrange(max(len(data), 1)) :]
        elif kind == 4 and len(data) > 8:
            at = chance.randrange(len(data) - 8)
            data[at : at + 8] = bytes(8)
        else:
            data += b"\0" * 8
        path.write_bytes(data)
        where = f"{path.name}, kind {kind}, {number}"
        try:
            manifest = read_manifest(copy.path)
            # As in a run that planned before the damage came about.
            loader = opened(world, manifest, plan, workers=0)
            for row, batch in delivered(loader).items():
                same = next(packs_of(batch, 512)) == expected[row]
                assert same or ((0, row) in loader.masked and batch.n_masked == 1), where
            outcomes["masked" if loader.n_masked else "delivered"] += 1
        except (ManifestError, LoaderError) as error:
            outcomes[type(error).__name__] += 1
            assert path.name in str(error) or ".tar: sample " in str(error), error
        if bytes(data) != sound:
            try:
                missed = not is_damaged(validate(read_manifest(copy.path), 0, None, CHECKS))
            except ManifestError as error:
                missed = False
                assert path.name in str(error) or "index" in str(error), error
            if missed:
                assert path == copy.path and pq.read_table(path).equals(table), where
                outcomes["without meaning"] += 1
        path.write_bytes(sound)
    assert outcomes["ManifestError"] > 40 and outcomes["masked"] and outcomes["LoaderError"]
    assert outcomes["without meaning"] < 10


def test_an_index_that_differs_is_found_shard_by_shard(copy: Manifest) -> None:
    """Array elements look at a few shards each, and at the manifest's rows of these only."""
    column, last = copy.path.parent / "index" / "tokens.npy", len(copy.info.shards) - 1
    data = bytearray(column.read_bytes())
    data[-4] ^= 1
    column.write_bytes(data)
    changed = read_manifest(copy.path)
    assert not is_damaged(validate(changed, 1, last - 1, CHECKS))
    (entry,) = validate(changed, last, None, CHECKS)["bad_shards"]
    assert entry["shard"] == copy.info.shards[last].name
    assert "index/tokens.npy and manifest.parquet differ" in entry["cause"]


def test_the_manifest_of_another_build(world: World, tmp_path: Path) -> None:
    """Same names, same sizes, other texts: the run masks sample after sample, then stops."""
    rows = toys.chat_rows(12, first=100)
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = message["content"].replace("Há", "Eu")
    other = toys.write_parquet(tmp_path / "other.parquet", rows)
    data = dataclasses.replace(world.data, root=str(tmp_path / "other"))
    source, digest = SourceConfig(str(other)), world.tokenizer.digest()
    theirs = build_dataset("more", source, data, toys.GEOMETRY, digest)
    copy = copied(world, "more", tmp_path)
    for name in ("manifest.parquet", "index"):
        place, origin = copy.path.parent / name, theirs.path.parent / name
        if origin.is_dir():
            shutil.rmtree(place)
            shutil.copytree(origin, place)
        else:
            shutil.copy(origin, place)
    wrong = read_manifest(copy.path)
    if [s.size for s in wrong.info.shards] != [s.size for s in copy.info.shards]:
        with pytest.raises(ManifestError, match=r"\.tar has \d+ bytes, its manifest says"):
            wrong.check_shards()
        pytest.fail("this build should have the same sizes")
    loader = opened(world, wrong, one_by_one(world, wrong), workers=0, max_masked=5)
    with pytest.raises(LoaderError, match=r"more than data.max_masked=5 .*CRC-32 of its JSON"):
        delivered(loader)
    report = validate(wrong, 0, None, CHECKS)
    assert {entry["row"] for entry in report["bad"]} == set(range(12))


def forged(manifest: Manifest, change: object) -> Manifest:
    """A manifest with right digests, in which `change` has altered row 1."""
    rows = pq.read_table(manifest.path).replace_schema_metadata(None).to_pylist()
    change(rows)  # type: ignore[operator]
    table = pa.Table.from_pylist(rows, schema=pq.read_schema(manifest.path).remove_metadata())
    write_manifest(manifest.path, table, manifest.info)
    return read_manifest(manifest.path)


def _shift(rows: list[dict]) -> None:
    rows[1]["json_offset"] += 512


def _shorten(rows: list[dict]) -> None:
    rows[1]["images"][0]["size"] -= 1


def _exchange(rows: list[dict]) -> None:
    rows[1]["images"][0]["offset"], rows[4]["images"][0]["offset"] = (
        rows[4]["images"][0]["offset"],
        rows[1]["images"][0]["offset"],
    )


def _crc(rows: list[dict]) -> None:
    rows[1]["json_crc32"] ^= 1


def _turned(rows: list[dict]) -> None:
    image = rows[1]["images"][0]
    image["width"], image["height"] = image["height"] + 1, image["width"]


def _longer(rows: list[dict]) -> None:
    rows[1]["tokens"] += 1


def _more_targets(rows: list[dict]) -> None:
    rows[1]["target_tokens"] -= 1


@pytest.mark.parametrize(
    "change", [_shift, _shorten, _exchange, _crc, _turned, _longer, _more_targets]
)
def test_a_forged_manifest(world: World, copy: Manifest, change: object) -> None:
    """Right digests over wrong facts: a sample whose bytes are not found is masked; one whose bytes
    are whole but of another size or length stops the run, since everything else is in doubt."""
    from data_shards.records import RecordEncoder

    wrong = forged(copy, change)
    loader = opened(world, wrong, one_by_one(world, wrong), workers=0)
    if change in (_turned, _longer, _more_targets):
        with pytest.raises(LoaderError, match=r"\.tar: sample 0000\d+ \(row 1\): .*its bytes are"):
            delivered(loader)
    else:
        delivered(loader)
        assert (0, 1) in loader.masked and loader.n_masked <= 2
    encoder = RecordEncoder(wrong, world.tokenizer, toys.GEOMETRY)
    report = validate(wrong, 0, None, dataclasses.replace(CHECKS, encoder=encoder))
    assert 1 in {entry["row"] for entry in report["bad"]}


def test_members_are_where_they_should_be(copy: Manifest) -> None:
    """The campaign's own idea of a shard is that of the bytes."""
    for place in places(copy):
        data = place.shard.read_bytes()
        assert data[place.offset - 512 + 257 :][:5] == b"ustar"
        assert place.end % 512 == 0
