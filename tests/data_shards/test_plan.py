"""The plan: pure, full, independent of replicas, honest about what does not fit."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema.data import DataConfig, PhaseConfig
from data_shards.manifest import Manifest
from data_shards.plan import Plan, PlanError, build_plan, sequential_plan
from data_shards.plan_sources import padded_tokens
from tests.data_shards import toys
from tests.data_shards.made_manifest import made_manifest

ALL = slice(None)
Manifests = dict[str, Manifest]


def mixed(weights: Mapping[str, float], **changes: Any) -> DataConfig:
    """A mixture of stage 2."""
    return DataConfig(root="-", tokenizer="-", mix={"stage2": dict(weights)}, **changes)


MIX = mixed({"chats": 0.7, "more": 0.3})


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    """`chats` (24 samples), `more` (12), `pairs` (9), `long` (600)."""
    folder = tmp_path_factory.mktemp("manifests")
    generator = np.random.default_rng(0)

    def some(count: int, most: int = 200) -> tuple[list[int], list[int]]:
        tiles = generator.integers(0, 4, count)
        return (tiles * 30 + generator.integers(20, most, count)).tolist(), tiles.tolist()

    return {
        "chats": made_manifest(folder / "chats", *some(24), shard=7),
        "more": made_manifest(folder / "more", *some(12), shard=5),
        "pairs": made_manifest(folder / "pairs", *some(9), rejected=70),
        "long": made_manifest(folder / "long", *some(600, 60), shard=50),
    }


def ids(plan: Plan) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in plan.samples.tolist()]


def test_pure_and_sensitive(manifests: Manifests) -> None:
    plan = build_plan(manifests, MIX, toys.stage())
    turned = mixed({"more": 0.3, "chats": 0.7})
    again = build_plan(manifests, turned, toys.stage())
    assert plan.digest == again.digest and np.array_equal(plan.samples, again.samples)
    assert plan.names == ("chats", "more")
    digests = {plan.digest}
    for change in (
        {"seed": 5}, {"steps": 6}, {"sequence_length": 544}, {"global_batch_size": 2},
        {"packing": False}, {"document_multiple": 8}, {"max_tiles_per_pack": 24},
        {"max_tiles_over_mean": 1.5}, {"steps": None, "epochs": 1.0},
    ):  # fmt: skip
        digests.add(build_plan(manifests, MIX, toys.stage(**change)).digest)
    for data in (
        mixed({"chats": 0.7, "more": 0.4}),
        dataclasses.replace(MIX, weigh_by="tokens"),
        dataclasses.replace(MIX, shuffle_shards=2),
        dataclasses.replace(
            MIX, curriculum={"stage2": {"x": PhaseConfig(1.0, {"chats": 7, "more": 4})}}
        ),
    ):
        digests.add(build_plan(manifests, data, toys.stage()).digest)
    digests.add(sequential_plan(manifests, MIX, toys.stage()).digest)
    other = dataclasses.replace(
        manifests["more"], info=dataclasses.replace(manifests["more"].info, digest="f" * 64)
    )
    digests.add(build_plan({**manifests, "more": other}, MIX, toys.stage()).digest)
    assert len(digests) == 16


def test_what_does_not_decide_the_order_is_not_in_the_digest(manifests: Manifests) -> None:
    plan = build_plan(manifests, MIX, toys.stage())
    same = toys.stage(micro_batch_size=2, log_every=7, number=1)
    data = dataclasses.replace(MIX, root="elsewhere", load_workers=9)
    assert build_plan(manifests, data, same).digest == plan.digest


def test_the_plan_is_this_one(manifests: Manifests) -> None:
    """Golden: a change here changes the batches of every run (raise plan.ALGORITHM then)."""
    plan = build_plan(manifests, MIX, toys.stage(steps=1))
    assert [pack.tolist() for pack in plan.packs(0)] == GOLDEN


def test_steps_outside(manifests: Manifests) -> None:
    plan = build_plan(manifests, MIX, toys.stage())
    for step in (-1, 5):
        with pytest.raises(PlanError, match="outside the plan's 5 steps"):
            plan.packs(step)


@pytest.mark.parametrize("limit", [{"max_tiles_per_pack": 9}, {"max_tiles_over_mean": 1.1}])
def test_packs_hold_what_fits_and_every_step_is_full(
    manifests: Manifests, limit: dict[str, Any]
) -> None:
    stage = toys.stage(document_multiple=8, steps=40, **limit)
    plan = build_plan(manifests, MIX, stage)
    chosen = [manifests[name] for name in plan.names]
    lengths = [padded_tokens(manifest, 8, ALL) for manifest in chosen]
    assert all((length % 8 == 0).all() for length in lengths)
    packs = [pack for step in range(plan.steps) for pack in plan.packs(step)]
    assert len(plan.offsets) == len(packs) + 1 == 40 * 4 + 1
    most = 0
    for number, pack in enumerate(packs):
        assert len(pack)
        assert sum(lengths[which][row] for which, row in pack) <= 512
        tiles = sum(int(chosen[which].tiles[row]) for which, row in pack)
        real = [int(chosen[which].tokens[row]) for which, row in pack]
        assert plan.tiles[number] == tiles
        assert plan.attention[number] == sum(n * (n + 1) // 2 for n in real)
        most = max(most, tiles)
    if "max_tiles_over_mean" in limit:
        free = build_plan(manifests, MIX, toys.stage(document_multiple=8, steps=40))
        assert most <= 1.12 * free.tiles.mean() < free.tiles.max()
    else:
        assert most <= 9


def test_epochs_of_one_source_without_packing_are_exact(manifests: Manifests) -> None:
    stage = toys.stage(steps=None, epochs=2.0, packing=False, global_batch_size=8)
    plan = build_plan(manifests, mixed({"chats": 1.0}), stage)
    assert plan.steps == 6
    first, second = plan.samples[:24, 1], plan.samples[24:, 1]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))
    assert not np.array_equal(first, second)


def test_epochs_with_packing_are_rounded_up_to_full_steps(manifests: Manifests) -> None:
    plan = build_plan(manifests, MIX, toys.stage(steps=None, epochs=1.0))
    assert len(plan.offsets) - 1 == plan.steps * 4
    assert plan.report["samples"] >= 36
    smaller = build_plan(manifests, MIX, toys.stage(steps=plan.steps - 1))
    assert smaller.report["samples"] < 36 + 4 * max(np.diff(plan.offsets))


def test_shares_of_samples_and_report(manifests: Manifests) -> None:
    plan = build_plan(manifests, MIX, toys.stage(steps=50))
    shares = {name: source["share"] for name, source in plan.report["sources"].items()}
    assert abs(shares["chats"] - 0.7) < 0.01 and abs(shares["more"] - 0.3) < 0.01
    assert plan.report["efficiency"] > 0.9
    tokens = sum(int(manifests[plan.names[which]].tokens[row]) for which, row in plan.samples)
    assert plan.report["tokens"] == tokens
    assert plan.report["tiles"] == plan.tiles.sum() and plan.report["packs"] == 200


def test_shares_of_tokens(manifests: Manifests) -> None:
    """`long` has samples less than half as long as `chats`, so more of them for the same share."""
    data = mixed({"chats": 0.5, "long": 0.5}, weigh_by="tokens")
    plan = build_plan(manifests, data, toys.stage(steps=200))
    sources = plan.report["sources"]
    assert abs(sources["chats"]["token_share"] - 0.5) < 0.01
    means = [manifests[name].tokens.mean() for name in ("chats", "long")]
    assert abs(sources["chats"]["share"] - means[1] / sum(means)) < 0.01
    assert means[0] > 1.5 * means[1]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [{"steps": 100}, {"steps": None, "epochs": 2.0}])
def test_a_curriculum_changes_the_mixture_on_the_way(
    manifests: Manifests, packing: bool, length: dict[str, Any]
) -> None:
    phases = {
        "late": PhaseConfig(1.0, {"chats": 1.0}),
        "warm": PhaseConfig(0.3, {"long": 3.0, "more": 1.0}),
    }
    data = DataConfig(root="-", tokenizer="-", curriculum={"stage2": phases})
    plan = build_plan(manifests, data, toys.stage(packing=packing, **length))
    assert plan.names == ("chats", "long", "more")
    count = len(plan.samples)
    chats = plan.samples[:, 0] == 0
    # Packs that are open when a phase ends hold samples of both, until they are too old.
    before, after = (100, 700) if packing else (12, 12)
    border = round(0.3 * count)
    assert not chats[: border - before].any() and chats[border + after :].all()
    assert chats[border + before :].mean() > 0.95
    early = plan.samples[: border - before, 0]
    assert abs((early == 1).mean() - 0.75) < 0.03
    if length["steps"] is None and not packing:
        assert count == 4 * plan.steps and count - 3 <= 2 * (24 + 600 + 12) <= count
        assert not chats[: int(0.3 * count) - 1].any()


def test_sequential_visits_each_once(manifests: Manifests) -> None:
    for packing in (True, False):
        plan = sequential_plan(manifests, MIX, toys.stage(packing=packing))
        assert sorted(ids(plan)) == [(0, n) for n in range(24)] + [(1, n) for n in range(12)]
        assert len(plan.offsets) - 1 == plan.steps * 4


def test_sequential_does_not_depend_on_the_weights(manifests: Manifests) -> None:
    plans = [
        sequential_plan(manifests, mixed({"chats": w, "more": 1}), toys.stage()) for w in (1, 2)
    ]
    assert plans[0].digest == plans[1].digest


def test_sequential_fills_the_last_step_with_empty_packs(manifests: Manifests) -> None:
    stage = toys.stage(packing=False, global_batch_size=7)
    plan = sequential_plan(manifests, mixed({"more": 1.0}), stage)
    assert plan.steps == 2 and [len(pack) for pack in plan.packs(1)] == [1] * 5 + [0] * 2
    assert plan.tiles[-2:].tolist() == plan.attention[-2:].tolist() == [0, 0]


def test_packed_and_unpacked_draw_the_same_samples(manifests: Manifests) -> None:
    data = mixed({"chats": 1.0})
    packed = build_plan(manifests, data, toys.stage(steps=3))
    count = len(packed.samples)
    stage = toys.stage(steps=count, global_batch_size=1, packing=False)
    unpacked = build_plan(manifests, data, stage)
    assert sorted(ids(packed)) == sorted(ids(unpacked))


def test_too_long_samples_are_refused_and_counted(tmp_path: Path) -> None:
    """Up to 1 % of the mixture is left out; more is an error that names the remedy."""
    many = made_manifest(tmp_path / "chats", [50] * 150 + [600] + [50] * 49, [1] * 200, shard=30)
    data = mixed({"chats": 1.0})
    plan = build_plan({"chats": many}, data, toys.stage(steps=100))
    assert plan.refused == {"chats": 1}
    assert set(plan.samples[:, 1].tolist()) == set(range(200)) - {150}
    sequential = sequential_plan({"chats": many}, data, toys.stage())
    assert sorted(sequential.samples[:, 1].tolist()) == sorted(set(range(200)) - {150})


def test_more_than_one_percent_too_long(manifests: Manifests, tmp_path: Path) -> None:
    bad = made_manifest(tmp_path / "chats", [600] + [50] * 23, [2] * 24)
    message = (
        r"1 of 36 samples \(chats: 1\) do not fit stage.sequence_length=512 \(longest: 600\); raise"
    )
    with pytest.raises(PlanError, match=message):
        build_plan({**manifests, "chats": bad}, MIX, toys.stage())
    with pytest.raises(PlanError, match=r"max_tiles_per_pack=1 \(most tiles: 3\)"):
        build_plan(manifests, MIX, toys.stage(max_tiles_per_pack=1))


def test_a_limit_over_the_mean_refuses_nobody(tmp_path: Path) -> None:
    """Mostly text: the mean pack has fewer tiles than one image."""
    lone = made_manifest(tmp_path / "text", [100] * 99 + [300], [0] * 99 + [9])
    stage = toys.stage(max_tiles_over_mean=1.0, steps=40)
    plan = build_plan({"text": lone}, mixed({"text": 1.0}), stage)
    assert 99 in plan.samples[:, 1] and plan.tiles.max() == 9


def test_the_document_multiple_counts_for_pairs_twice(manifests: Manifests) -> None:
    stage = toys.stage(objective="dpo", document_multiple=64, sequence_length=1024)
    plan = build_plan(manifests, mixed({"pairs": 1.0}), stage)
    lengths = padded_tokens(manifests["pairs"], 64, ALL)
    assert (lengths % 64 == 0).all() and (lengths >= 128).all()
    for number, pack in enumerate(plan.packs(0)):
        assert lengths[pack[:, 1]].sum() <= 1024
        chosen = manifests["pairs"].tokens[pack[:, 1]].tolist()
        assert plan.attention[number] == sum(n * (n + 1) // 2 + 70 * 71 // 2 for n in chosen)


@pytest.mark.parametrize(
    ("weights", "objective", "words"),
    [
        ({}, "sft", "draws from no source"),
        ({"chats": 0.0}, "sft", "draws from no source"),
        ({"none": 1.0}, "sft", "no manifest for none"),
        ({"chats": 1.0}, "dpo", "holds plain samples, but stage.objective=dpo"),
        ({"pairs": 1.0}, "sft", "holds preference pairs, but stage.objective=sft"),
    ],
)
def test_mixtures_that_make_no_plan(
    manifests: Manifests, weights: dict[str, float], objective: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        build_plan(manifests, mixed(weights), toys.stage(objective=objective))


def test_data_sets_of_different_tokenizers(manifests: Manifests, tmp_path: Path) -> None:
    other = made_manifest(tmp_path / "more", [50] * 9, tokenizer="f" * 64)
    with pytest.raises(PlanError, match="differ in tokenizer_digest; build both again"):
        build_plan({**manifests, "more": other}, MIX, toys.stage())


GOLDEN = [
    [[1, 1], [0, 7], [1, 11], [0, 8], [0, 17]],
    [[0, 2], [1, 4], [0, 20]],
    [[0, 19], [0, 4], [0, 12]],
    [[0, 1], [1, 7]],
]
