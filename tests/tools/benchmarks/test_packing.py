"""What packing and planning are measured with: honest rivals, and figures that can be checked."""

from pathlib import Path

import numpy as np
import pytest

from data_shards.plan import build_plan
from models.anyres import AnyresGeometry, pinpoints_up_to
from tests.data_shards import toys
from tests.data_shards.made_manifest import made_manifest
from tools.benchmarks.data.manifests import CHATS, TEXT, picture_sizes, write_law
from tools.benchmarks.data.packing import (
    mixture,
    next_fit,
    repacked,
    sizes_of,
    sorted_first_fit,
)
from tools.benchmarks.data.planning import shards_read

GEOMETRY = AnyresGeometry(tile=384, patch=16, pinpoints=pinpoints_up_to(384, 12))


def test_rivals_pack_every_sample_within_the_length() -> None:
    tokens = np.random.default_rng(0).integers(1, 600, 5000).tolist()
    packs = {}
    for pack in (next_fit, sorted_first_fit):
        numbers = pack(tokens, 1000)
        assert len(numbers) == 5000 and sorted(set(numbers)) == list(range(max(numbers) + 1))
        assert np.bincount(numbers, tokens).max() <= 1000
        packs[pack] = max(numbers) + 1
    assert packs[sorted_first_fit] < packs[next_fit] < 5000
    assert next_fit([600, 600, 300, 200], 1000) == [0, 1, 1, 2]


def test_repacked_samples_have_the_figures_of_their_packs(tmp_path: Path) -> None:
    tokens, tiles = [10, 20, 30, 40, 50, 60], [1, 0, 2, 0, 3, 1]
    manifests = {"a": made_manifest(tmp_path / "a", tokens, tiles)}
    stage = toys.stage(steps=None, epochs=1.0, packing=False, global_batch_size=1)
    plan = build_plan(manifests, mixture({"a": 1.0}), stage)
    sizes = sizes_of(plan, manifests).tolist()
    assert sorted(sizes) == tokens
    other = repacked(plan, manifests, [0, 1, 0, 1, 2, 2])
    rows = plan.samples[:, 1].tolist()
    for number, members in enumerate(([0, 2], [1, 3], [4, 5])):
        mine = [rows[m] for m in members]
        assert other.pack(number)[:, 1].tolist() == mine
        assert other.tiles[number] == sum(tiles[row] for row in mine)
        assert other.attention[number] == sum(tokens[r] * (tokens[r] + 1) // 2 for r in mine)
    assert other.report["efficiency"] == pytest.approx(210 / (3 * 512))


def test_shards_of_a_step_are_counted(tmp_path: Path) -> None:
    manifests = {
        "a": made_manifest(tmp_path / "a", [50] * 40, shard=4),
        "b": made_manifest(tmp_path / "b", [50] * 40, shard=8),
    }
    stage = toys.stage(steps=None, epochs=1.0, packing=False, global_batch_size=10)
    data = mixture({"a": 0.5, "b": 0.5}, shuffle_shards=1)
    step, together = shards_read(build_plan(manifests, data, stage), manifests)
    assert 3 <= step <= 4.5 and together == 15
    wide = mixture({"a": 0.5, "b": 0.5}, shuffle_shards=99)
    step, together = shards_read(build_plan(manifests, wide, stage), manifests)
    assert step > 6 and together == 15


def test_manifests_follow_the_law_and_the_geometry(tmp_path: Path) -> None:
    chats = write_law(tmp_path / "chats", CHATS, 3000, GEOMETRY, shard=1000)
    chats.verify_index()
    assert len(chats) == 3000 and len(chats.info.shards) == 3
    for image in range(0, len(chats.image_hw), 97):
        height, width = chats.image_hw[image].tolist()
        assert chats.image_tiles[image] == GEOMETRY.n_tiles(height, width)
    images = np.diff(chats.first_image)
    assert set(images.tolist()) == {1, 2} and 0.07 < (images == 2).mean() < 0.13
    shown = {
        (h, w): n for h, w, _, n in zip(*(c.tolist() for c in picture_sizes(GEOMETRY)), strict=True)
    }
    first = chats.image_hw[: images[0]].tolist()
    assert chats.tokens[0] > sum(shown[h, w] for h, w in first)
    text = write_law(tmp_path / "text", TEXT, 2000, GEOMETRY)
    assert not text.tiles.any() and 600 < np.median(text.tokens) < 900
    again = write_law(tmp_path / "again" / "text", TEXT, 2000, GEOMETRY)
    assert np.array_equal(again.tokens, text.tokens)
