"""What a pack holds: from manifests as the real plan packs them, else assumed and said so."""

import dataclasses
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from data_shards.plan import build_plan
from tests.data_shards import toys
from tests.data_shards.conftest import World, tokenizer_directory, world
from tools.plan.manifest_row import count_samples, row_from_manifests
from tools.plan.workload import row_of, steps_of

__all__ = ["tokenizer_directory", "world"]
WEIGHTS = {"chats": 0.7, "more": 0.3}


def config_of(stage: int, *overrides: str) -> Config:
    start = ["model=amalia_vl_9b", "data=amalia", "cluster=mn5", f"stage=stage{stage}"]
    return compose([*start, *overrides])


def test_manifests_give_what_the_plan_packs(world: World) -> None:
    stage = toys.stage(steps=200)
    paths = {name: world.manifests[name].path for name in WEIGHTS}
    row = row_from_manifests(paths, WEIGHTS, stage)
    data = dataclasses.replace(world.data, mix={"stage2": WEIGHTS})
    plan = build_plan(world.manifests, data, stage)
    report, packs = plan.report, plan.report["packs"]
    # The planner knows no packing: it takes 98 % for full. Toy packs hold few samples.
    scale = report["tokens"] / packs / row.real
    assert 0.85 < scale < 1.02
    assert scale * row.tiles == pytest.approx(report["tiles"] / packs, rel=0.05)
    assert scale * row.targets == pytest.approx(report["target_tokens"] / packs, rel=0.05)
    assert scale * row.samples == pytest.approx(report["samples"] / packs, rel=0.05)
    tiles = [
        sum(int(world.manifests[plan.names[w]].tiles[r]) for w, r in pack.tolist())
        for step in range(plan.steps)
        for pack in plan.packs(step)
    ]
    assert row.most_tiles >= max(tiles)
    assert row.source.startswith("2 manifests")


def test_samples_are_counted(world: World) -> None:
    paths = [world.manifests[name].path for name in WEIGHTS]
    assert count_samples(paths) == sum(len(world.manifests[name]) for name in WEIGHTS)


def test_a_manifest_is_found_where_the_configuration_says(world: World) -> None:
    path = world.manifests["chats"].path
    data = dataclasses.replace(
        config_of(2).data, root=str(path.parent.parent), mix={"stage2": {path.parent.name: 1.0}}
    )
    assert row_of(dataclasses.replace(config_of(2), data=data)).source.startswith("1 manifests")


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    path.write_bytes(b"not Parquet")
    with pytest.raises(ConfigError, match=r"is not a manifest: .*make shards"):
        row_from_manifests({"x": path}, {"x": 1.0}, toys.stage())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_manifests_it_says_that_it_assumes(stage: int) -> None:
    row = row_of(config_of(stage))
    assert row.source.startswith("assumed, no manifest")
    assert 0 < row.targets < row.real <= row.tokens and row.tiles <= row.most_tiles


def test_settings_win() -> None:
    row = row_of(config_of(2), {"document": 1000, "tiles": 5, "targets": 0.5, "fill": 0.75})
    assert row.real == 0.75 * 16384 and row.targets == 0.5 * row.real
    assert (row.document, row.tiles) == (1000, 5)
    assert "given: document=1000 tiles=5 targets=0.5 fill=0.75" in row.source


@pytest.mark.parametrize("wrong", [{"fill": 1.5}, {"targets": 2.0}, {"tiles": -1}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        row_of(config_of(2), wrong)


def test_a_limit_of_tiles_is_kept() -> None:
    row = row_of(config_of(2, "stage.max_tiles_per_pack=14"))
    assert row.tiles <= row.most_tiles == 14


def test_epochs_become_steps() -> None:
    config = config_of(3)  # one epoch
    row = row_of(config)
    steps = steps_of(config, row, {"samples": 128_000})
    assert steps == -(-int(128_000 / row.samples) // 128)
    assert steps_of(config_of(2), row) == 49_000
