"""Batches: right content, the same from every worker count, damage masked in place."""

import dataclasses
import logging
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from conf.schema.stage import StageConfig
from data_shards import images
from data_shards.balance import PackCost
from data_shards.batch import PackedBatch
from data_shards.loader import Loader, LoaderError
from data_shards.manifest import Manifest, ManifestError, read_manifest, write_manifest
from data_shards.plan import Plan, PlanError, build_plan, sequential_plan
from data_shards.reader import DescriptorCache, ShardReader
from data_shards.records import RecordEncoder
from tests.data_shards import toys
from tests.data_shards.conftest import World
from tests.data_shards.loader_process import packs_of
from tests.data_shards.test_reader import flip, shard_of

WEIGHTS = {"chats": 0.7, "more": 0.3}
GRID = toys.GEOMETRY.grid


def loader(world: World, plan: Plan, **options: object) -> Loader:
    manifests = options.pop("manifests", world.manifests)
    geometry = options.pop("geometry", toys.GEOMETRY)
    tokenizer = options.pop("tokenizer", world.tokenizer)
    return Loader(plan, manifests, tokenizer, geometry, **options)  # type: ignore[arg-type]


def planned(
    world: World,
    weights: Mapping[str, float] = WEIGHTS,
    stage: StageConfig | None = None,
    plan: Callable[..., Plan] = build_plan,
    manifests: Mapping[str, Manifest] | None = None,
) -> Plan:
    """The plan of a stage that draws by these weights."""
    stage = stage or toys.stage()
    data = dataclasses.replace(world.data, mix={stage.name: dict(weights)})
    return plan(manifests or world.manifests, data, stage)


def documents(batch: PackedBatch) -> list[tuple]:
    """Each document with tokens to train on, in terms that do not depend on where it stands:
    its tokens, labels, mask, and the pixels behind each image token."""
    found = []
    newline = len(batch.tiles_NCHW) * GRID * GRID
    row_at = dict(zip(batch.image_positions_P.tolist(), batch.image_rows_P.tolist(), strict=True))
    for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        if not batch.loss_mask_T[start:stop].any():
            continue
        length = int(np.flatnonzero(batch.loss_mask_T[start:stop]).max()) + 2
        pixels = []
        for position in range(start, start + length):
            if position in row_at:
                row = row_at[position]
                if row == newline:
                    pixels.append(b"newline")
                    continue
                tile, patch = divmod(row, GRID * GRID)
                y, x = divmod(patch, GRID)
                side = toys.GEOMETRY.patch
                patch_CHW = batch.tiles_NCHW[tile][
                    :, y * side : (y + 1) * side, x * side : (x + 1) * side
                ]
                pixels.append(patch_CHW.tobytes())
        parts = [batch.tokens_T, batch.labels_T, batch.loss_mask_T, batch.position_ids_T]
        arrays = [part[start : start + length].tobytes() for part in parts]
        found.append((*arrays, tuple(pixels)))
    return found


def check_format(batch: PackedBatch, world: World, names: tuple[str, ...], packs: int) -> None:
    total = packs * 512
    for name, dtype in (
        ("tokens_T", np.int64), ("labels_T", np.int64), ("loss_mask_T", np.float32),
        ("position_ids_T", np.int64),
    ):  # fmt: skip
        array = getattr(batch, name)
        assert array.dtype == dtype and array.shape == (total,)
    assert batch.cu_seqlens.dtype == np.int32 and batch.tiles_NCHW.dtype == np.uint8
    for name in ("image_positions_P", "image_rows_P", "pairs", "sample_ids"):
        assert getattr(batch, name).dtype == np.int64
    lengths = np.diff(batch.cu_seqlens)
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == total and (lengths > 0).all()
    assert set(range(0, total + 1, 512)) <= set(batch.cu_seqlens.tolist())  # whole packs
    starts = np.repeat(batch.cu_seqlens[:-1], lengths)
    assert np.array_equal(batch.position_ids_T, np.arange(total) - starts)
    # Labels are the next token of the same document.
    on = np.flatnonzero(batch.loss_mask_T)
    assert np.array_equal(batch.labels_T[on], batch.tokens_T[on + 1])
    assert (
        not np.isin(on + 1, batch.cu_seqlens).any()
        and (batch.labels_T[batch.loss_mask_T == 0] == 0).all()
    )
    # Every image token has a feature and the other way round.
    marks = np.flatnonzero(batch.tokens_T == world.tokenizer.image_token_id)
    assert np.array_equal(np.sort(batch.image_positions_P), marks)
    rows, newline = batch.image_rows_P, len(batch.tiles_NCHW) * GRID * GRID
    assert len(rows) == len(batch.image_positions_P)
    assert not len(rows) or (rows.min() >= 0 and rows.max() <= newline)
    chosen = [world.manifests[name] for name in names]
    targets = sum(chosen[which].target_tokens[row] for which, row in batch.sample_ids)
    assert batch.loss_mask_T.sum() == targets and batch.n_masked == 0
    n_images = sum(
        chosen[which].first_image[row + 1] - chosen[which].first_image[row]
        for which, row in batch.sample_ids
    )
    assert batch.n_images == n_images


def test_format_and_content(world: World) -> None:
    stage = toys.stage(document_multiple=8)
    plan = planned(world, WEIGHTS, stage)
    for micro in (1, 2, 4):
        batches = loader(world, plan, micro_batch_size=micro).step(2)
        assert len(batches) == 4 // micro
        for batch in batches:
            check_format(batch, world, plan.names, micro)
            assert not (batch.cu_seqlens % 8).any()


def test_documents_are_the_samples(world: World) -> None:
    """Against the tokenizer and the picture directly, without plan, packing or collation."""
    plan = planned(world, {"chats": 1.0})
    manifest = world.manifests["chats"]
    reader = ShardReader(manifest, DescriptorCache())
    import json

    for batch in loader(world, plan).step(0):
        position, first_tile = 0, 0
        for _, row in batch.sample_ids:
            record, encoded = reader.read(int(row))
            pictures = [images.decode(data, 1 << 20) for data in encoded]
            n_tokens = [toys.GEOMETRY.n_tokens(p.height, p.width) for p in pictures]
            document = world.tokenizer.encode(json.loads(record)["messages"], n_tokens)
            stop = position + len(document.ids)
            assert np.array_equal(batch.tokens_T[position:stop], document.ids)
            assert np.array_equal(
                batch.loss_mask_T[position : stop - 1], document.targets[1:].astype(np.float32)
            )
            for picture in pictures:
                tiles = images.tiles(picture, toys.GEOMETRY)
                found = batch.tiles_NCHW[first_tile : first_tile + len(tiles)]
                assert np.array_equal(found, tiles)
                first_tile += len(tiles)
            position = stop
        assert (batch.tokens_T[position:] == world.tokenizer.pad_id).all()


def test_packed_and_unpacked_hold_the_same_documents(world: World) -> None:
    found = []
    for packing, size in ((True, 4), (False, 4), (True, 1)):
        stage = toys.stage(packing=packing, global_batch_size=size, document_multiple=4)
        plan = planned(world, WEIGHTS, stage, sequential_plan)
        all_batches = loader(world, plan, micro_batch_size=size, workers=2).batches()
        found.append(sorted(d for _, batches in all_batches for b in batches for d in documents(b)))
    assert len(found[0]) == 36 and found[0] == found[1] == found[2]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_from_every_number_of_workers(world: World, workers: int) -> None:
    plan = planned(world)
    inline = loader(world, plan, micro_batch_size=2, workers=0)
    expected = dict(inline.batches())
    found = dict(loader(world, plan, micro_batch_size=2, workers=workers).batches())
    assert list(expected) == list(found) == [0, 1, 2, 3, 4]
    for step, batches in expected.items():
        assert all(a.equals(b) for a, b in zip(batches, found[step], strict=True))
        assert all(a.equals(b) for a, b in zip(batches, inline.step(step), strict=True))


def test_resuming_at_a_step_gives_that_step(world: World) -> None:
    plan = planned(world)
    whole = dict(loader(world, plan).batches())
    later = dict(loader(world, plan, workers=2).batches(3))
    assert list(later) == [3, 4]
    assert all(a.equals(b) for s in later for a, b in zip(whole[s], later[s], strict=True))
    assert list(dict(loader(world, plan).batches(1, 2))) == [1]


def test_replicas_see_the_global_batch_split(world: World) -> None:
    plan = planned(world)
    cost = PackCost(tile=10.0, pair=1.0)

    def packs(size: int, rank: int, micro_batch_size: int) -> Counter[str]:
        mine = loader(
            world,
            plan,
            cost=cost,
            dp_rank=rank,
            dp_size=size,
            micro_batch_size=micro_batch_size,
        ).step(1)
        assert len(mine) == 4 // size // micro_batch_size
        return Counter(digest for batch in mine for digest in packs_of(batch, 512))

    alone = packs(1, 0, 1)
    assert alone.total() == 4
    for size, micro_batch_size in ((2, 1), (2, 2), (4, 1), (1, 4)):
        shares = [packs(size, rank, micro_batch_size) for rank in range(size)]
        assert sum(shares, Counter()) == alone


def test_a_share_of_the_tiles(world: World) -> None:
    """Context-parallel ranks: what a rank's share of the tiles shows is all there, and pictures
    that no tile of it shows are not even decoded."""
    plan = planned(world, {"chats": 1.0})
    for number, batch in enumerate(loader(world, plan, micro_batch_size=4).step(0)):
        skipped = 0
        for ranks in (2, 3, 8):
            for rank in range(ranks):
                mine = loader(world, plan, micro_batch_size=4, tile_share=(rank, ranks))
                found = mine.step(0)[number]
                assert dataclasses.replace(found, tiles_NCHW=batch.tiles_NCHW).equals(batch)
                # As models.tile_sharing.own_share cuts.
                share = -(-len(batch.tiles_NCHW) // ranks)
                own = slice(rank * share, (rank + 1) * share)
                assert np.array_equal(found.tiles_NCHW[own], batch.tiles_NCHW[own])
                skipped += sum(not tile.any() for tile in found.tiles_NCHW)
        assert skipped > len(batch.tiles_NCHW)


def test_ranks_without_vision_get_everything_but_tiles(world: World) -> None:
    plan = planned(world)
    for full, other in zip(
        loader(world, plan).step(0), loader(world, plan, need_images=False).step(0), strict=True
    ):
        assert other.tiles_NCHW.shape == (1, 3, 32, 32) and not other.tiles_NCHW.any()
        assert dataclasses.replace(other, tiles_NCHW=full.tiles_NCHW).equals(full)


def test_pairs_share_tiles_and_stay_together(world: World) -> None:
    stage = toys.stage(objective="dpo", document_multiple=4)
    plan = planned(world, {"pairs": 1.0}, stage, sequential_plan)
    manifest, seen = world.manifests["pairs"], []
    for _, batches in loader(world, plan, micro_batch_size=2).batches():
        for batch in batches:
            check_format(batch, world, plan.names, 2)
            assert len(batch.pairs) == len(batch.sample_ids)
            assert (batch.pairs[:, 1] == batch.pairs[:, 0] + 1).all()
            tiles = manifest.tiles[batch.sample_ids[:, 1]].sum()
            assert len(batch.tiles_NCHW) == max(tiles, 1)
            for (chosen, rejected), (_, row) in zip(batch.pairs, batch.sample_ids, strict=True):
                seen.append(int(row))
                span = [batch.cu_seqlens[d : d + 2] for d in (chosen, rejected)]
                text = [world.tokenizer.decode(batch.tokens_T[a:b]) for a, b in span]
                assert "autocarro" in text[0] and "ônibus" in text[1]
                rows = [
                    batch.image_rows_P[
                        (batch.image_positions_P >= a) & (batch.image_positions_P < b)
                    ]
                    for a, b in span
                ]
                assert np.array_equal(*rows)
    assert sorted(seen) == list(range(9))


def test_text_only_and_empty_packs(world: World) -> None:
    """A pack without samples is one padding document; a batch without images has a black tile."""
    stage = toys.stage(packing=False, global_batch_size=7)
    plan = planned(world, {"more": 1.0}, stage, sequential_plan)
    batches = loader(world, plan).step(1)
    empty = batches[-1]
    assert empty.cu_seqlens.tolist() == [0, 512] and empty.sample_ids.shape == (0, 2)
    assert not empty.loss_mask_T.any() and empty.tiles_NCHW.shape == (1, 3, 32, 32)
    text = next(b for b in batches if len(b.sample_ids) and b.n_images == 0)
    assert not text.tiles_NCHW.any() and len(text.image_rows_P) == 0 and text.loss_mask_T.any()


# Damage


@pytest.fixture
def damaged(world: World, tmp_path: Path) -> dict[str, Manifest]:
    for name in ("chats", "pairs"):
        shutil.copytree(world.manifests[name].path.parent, tmp_path / name)
    return {
        name: read_manifest(tmp_path / name / "manifest.parquet") for name in ("chats", "pairs")
    }


@pytest.mark.parametrize("member", ["json", "image"])
@pytest.mark.parametrize("name", ["chats", "pairs"])
def test_a_bad_sample_is_masked_in_place(
    world: World, damaged: dict[str, Manifest], name: str, member: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    manifest, row = damaged[name], 1
    stage = toys.stage(objective="dpo" if name == "pairs" else "sft", document_multiple=4)
    plan = planned(world, {name: 1.0}, stage, sequential_plan, damaged)
    span = (
        manifest.json_span[row]
        if member == "json"
        else manifest.image_span[manifest.first_image[row]]
    )
    flip(shard_of(manifest, row), int(span.sum()) - 3)
    good = dict(loader(world, plan).batches())
    masked_by = []
    for workers, need_images in ((0, True), (2, True), (2, False)):
        mine = loader(world, plan, manifests=damaged, workers=workers, need_images=need_images)
        with caplog.at_level(logging.WARNING):
            found = dict(mine.batches())
        assert mine.n_masked == 1
        assert sum(batch.n_masked for batches in found.values() for batch in batches) == 1
        (message,) = {record.message for record in caplog.records}
        assert shard_of(manifest, row).name in message and "sample 000000001" in message
        assert "CRC-32" in message
        masked_by.append(found)
    for step, batches in good.items():
        for n, batch in enumerate(batches):
            other, blind = masked_by[0][step][n], masked_by[2][step][n]
            assert other.equals(masked_by[1][step][n])
            assert dataclasses.replace(blind, tiles_NCHW=other.tiles_NCHW).equals(other)
            assert np.array_equal(batch.cu_seqlens, other.cu_seqlens)
            assert np.array_equal(batch.sample_ids, other.sample_ids)
            assert np.array_equal(batch.pairs, other.pairs)
            assert batch.tiles_NCHW.shape == other.tiles_NCHW.shape
            expected = documents(batch)
            if row in batch.sample_ids[:, 1]:
                assert other.n_masked == 1
                lost = expected.copy()
                for document in documents(other):
                    lost.remove(document)
                assert len(lost) == (2 if name == "pairs" else 1)
            else:
                assert other.equals(batch)


def test_too_many_bad_samples(world: World, damaged: dict[str, Manifest]) -> None:
    manifest = damaged["chats"]
    for row in (1, 4, 9):
        flip(shard_of(manifest, row), int(manifest.json_span[row].sum()) - 3)
    plan = planned(world, {"chats": 1.0}, toys.stage(), sequential_plan, damaged)
    for workers in (0, 2):
        with pytest.raises(
            LoaderError, match=r"more than data.max_masked=2 samples had bad bytes, the last: .*tar"
        ):
            list(loader(world, plan, manifests=damaged, max_masked=2, workers=workers).batches())
    fine = loader(world, plan, manifests=damaged, max_masked=3)
    list(fine.batches())
    list(fine.batches())  # the same samples again do not count again
    assert fine.n_masked == 3


def test_another_tokenizer_or_geometry_is_refused(world: World, tmp_path: Path) -> None:
    from data_shards.chat import ChatTokenizer
    from models.anyres import AnyresGeometry

    plan = planned(world)
    other = ChatTokenizer.from_directory(toys.write_tokenizer(tmp_path, "fallback"))
    with pytest.raises(ManifestError, match=r"another tokenizer .* set data.tokenizer to that one"):
        loader(world, plan, tokenizer=other)
    geometry = AnyresGeometry(32, 8, toys.GEOMETRY.pinpoints[:-1])
    with pytest.raises(ManifestError, match="another tiling"):
        loader(world, plan, geometry=geometry)


def test_a_missing_shard_is_refused_at_once(world: World, damaged: dict[str, Manifest]) -> None:
    plan = planned(world, {"chats": 1.0}, toys.stage(), sequential_plan, damaged)
    shard_of(damaged["chats"], 0).unlink()
    with pytest.raises(ManifestError, match="is missing; restore"):
        loader(world, plan, manifests=damaged)


def test_whole_bytes_that_do_not_match_the_manifest_stop_the_run(
    world: World, damaged: dict[str, Manifest]
) -> None:
    """A manifest of another version: masking would hide that everything is wrong."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = damaged["chats"].path
    rows = pq.read_table(path).replace_schema_metadata(None)
    tokens = [value + 1 for value in rows["tokens"].to_pylist()]
    index = rows.column_names.index("tokens")
    write_manifest(path, rows.set_column(index, "tokens", pa.array(tokens)), damaged["chats"].info)
    manifests = {"chats": read_manifest(path)}
    plan = planned(world, {"chats": 1.0}, toys.stage(), sequential_plan, manifests)
    with pytest.raises(
        LoaderError,
        match=r"row \d+\): \d+ tokens, its manifest says \d+; .*another version built it",
    ):
        loader(world, plan, manifests=manifests).step(0)


def test_batches_that_do_not_divide(world: World) -> None:
    plan = planned(world)
    with pytest.raises(PlanError, match="not a multiple of .*micro_batch_size=3 times 1"):
        loader(world, plan, micro_batch_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_thread_reaches_the_caller(
    world: World, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """With the sample that it happened to, and no thread left behind."""

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(RecordEncoder, "encode", fails)
    with pytest.raises(MemoryError, match="no room") as caught:
        list(loader(world, planned(world), workers=workers).batches())
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"while loading .*\.tar: sample \d{9} \(row \d+\)", note)
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_leaving_the_iterator_stops_its_threads(world: World) -> None:
    plan = planned(world)
    iterator = loader(world, plan, workers=3).batches()
    next(iterator)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    iterator.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
