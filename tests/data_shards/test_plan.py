"""The plan: pure, full, independent of replicas, honest about what does not fit."""

import dataclasses

import numpy as np
import pytest

from data_shards.manifest import Manifest
from data_shards.plan import Plan, PlanError, build_plan, padded_tokens, sequential_plan
from tests.data_shards import toys
from tests.data_shards.conftest import World

WEIGHTS = {"chats": 0.7, "more": 0.3}


def ids(plan: Plan) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in plan.samples.tolist()]


def test_pure_and_sensitive(world: World) -> None:
    plan = build_plan(world.manifests, WEIGHTS, toys.stage())
    again = build_plan(world.manifests, dict(reversed(WEIGHTS.items())), toys.stage())
    assert plan.digest == again.digest and np.array_equal(plan.samples, again.samples)
    assert plan.names == ("chats", "more")
    digests = {plan.digest}
    for change in (
        {"seed": 5}, {"steps": 6}, {"sequence_length": 544}, {"global_batch_size": 2},
        {"packing": False}, {"document_multiple": 8}, {"max_tiles_per_pack": 24},
        {"steps": None, "epochs": 1.0},
    ):  # fmt: skip
        digests.add(build_plan(world.manifests, WEIGHTS, toys.stage(**change)).digest)
    digests.add(build_plan(world.manifests, {**WEIGHTS, "more": 0.4}, toys.stage()).digest)
    digests.add(sequential_plan(world.manifests, WEIGHTS, toys.stage()).digest)
    assert len(digests) == 11


def test_what_does_not_decide_the_order_is_not_in_the_digest(world: World) -> None:
    plan = build_plan(world.manifests, WEIGHTS, toys.stage())
    same = toys.stage(micro_batch_size=2, log_every=7, number=1)
    assert build_plan(world.manifests, WEIGHTS, same).digest == plan.digest


@pytest.mark.parametrize("size", [1, 2, 4])
def test_replicas_share_each_step_without_changing_it(world: World, size: int) -> None:
    plan = build_plan(world.manifests, WEIGHTS, toys.stage())
    for step in range(plan.steps):
        whole = [pack.tolist() for pack in plan.packs(step)]
        parts = [[p.tolist() for p in plan.packs(step, rank, size)] for rank in range(size)]
        assert [parts[n % size][n // size] for n in range(len(whole))] == whole


def test_replicas_that_do_not_divide(world: World) -> None:
    plan = build_plan(world.manifests, WEIGHTS, toys.stage())
    with pytest.raises(PlanError, match="not a multiple of the 3 data-parallel replicas"):
        plan.packs(0, 0, 3)
    with pytest.raises(PlanError, match="outside the plan's 5 steps"):
        plan.packs(5)


def test_packs_hold_what_fits_and_every_step_is_full(world: World) -> None:
    stage = toys.stage(document_multiple=8, max_tiles_per_pack=24)
    plan = build_plan(world.manifests, WEIGHTS, stage)
    chosen = [world.manifests[name] for name in plan.names]
    lengths = [padded_tokens(manifest, 8) for manifest in chosen]
    assert all((length % 8 == 0).all() for length in lengths)
    for step in range(plan.steps):
        packs = plan.packs(step)
        assert len(packs) == 4
        for pack in packs:
            assert len(pack)
            assert sum(lengths[which][row] for which, row in pack) <= 512
            assert sum(chosen[which].tiles[row] for which, row in pack) <= 24
    assert len(plan.offsets) == 5 * 4 + 1


def test_epochs_of_one_source_without_packing_are_exact(world: World) -> None:
    stage = toys.stage(steps=None, epochs=2.0, packing=False, global_batch_size=8)
    plan = build_plan(world.manifests, {"chats": 1.0}, stage)
    assert plan.steps == 6
    first, second = plan.samples[:24, 1], plan.samples[24:, 1]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))


def test_epochs_with_packing_are_rounded_up_to_full_steps(world: World) -> None:
    stage = toys.stage(steps=None, epochs=1.0)
    plan = build_plan(world.manifests, WEIGHTS, stage)
    assert len(plan.offsets) - 1 == plan.steps * 4
    assert plan.report["samples"] >= 36
    smaller = build_plan(world.manifests, WEIGHTS, toys.stage(steps=plan.steps - 1))
    assert smaller.report["samples"] < 36 + len(plan.packs(0)[0]) * 4


def test_shares_and_report(world: World) -> None:
    plan = build_plan(world.manifests, WEIGHTS, toys.stage(steps=50))
    shares = {name: source["share"] for name, source in plan.report["sources"].items()}
    assert abs(shares["chats"] - 0.7) < 0.01 and abs(shares["more"] - 0.3) < 0.01
    assert plan.report["efficiency"] > 0.9
    tokens = sum(int(world.manifests[plan.names[which]].tokens[row]) for which, row in plan.samples)
    assert plan.report["tokens"] == tokens


def test_sequential_visits_each_once(world: World) -> None:
    for packing in (True, False):
        plan = sequential_plan(world.manifests, WEIGHTS, toys.stage(packing=packing))
        assert sorted(ids(plan)) == [(0, n) for n in range(24)] + [(1, n) for n in range(12)]
        assert len(plan.offsets) - 1 == plan.steps * 4


def test_sequential_fills_the_last_step_with_empty_packs(world: World) -> None:
    stage = toys.stage(packing=False, global_batch_size=7)
    plan = sequential_plan(world.manifests, {"more": 1.0}, stage)
    assert plan.steps == 2 and [len(pack) for pack in plan.packs(1)] == [1] * 5 + [0] * 2


def test_packed_and_unpacked_draw_the_same_samples(world: World) -> None:
    packed = build_plan(world.manifests, {"chats": 1.0}, toys.stage(steps=3))
    count = len(packed.samples)
    stage = toys.stage(steps=count, global_batch_size=1, packing=False)
    unpacked = build_plan(world.manifests, {"chats": 1.0}, stage)
    assert sorted(ids(packed)) == sorted(ids(unpacked))


def with_tokens(manifest: Manifest, tokens: list[int]) -> Manifest:
    return dataclasses.replace(manifest, tokens=np.array(tokens, np.int32))


def test_too_long_samples_are_refused_and_counted(world: World) -> None:
    """Up to 1 % of the mixture is left out; more is an error that names the remedy."""
    many = dataclasses.replace(
        world.manifests["chats"],
        tokens=np.array([50] * 199 + [600], np.int32),
        tokens_rejected=np.zeros(200, np.int32),
        target_tokens=np.ones(200, np.int32),
        tiles=np.ones(200, np.int32),
    )
    plan = build_plan({"chats": many}, {"chats": 1.0}, toys.stage(steps=100))
    assert plan.refused == {"chats": 1} and 199 not in plan.samples[:, 1]
    assert set(plan.samples[:, 1].tolist()) == set(range(199))
    sequential = sequential_plan({"chats": many}, {"chats": 1.0}, toys.stage())
    assert sorted(sequential.samples[:, 1].tolist()) == list(range(199))


def test_more_than_one_percent_too_long(world: World) -> None:
    chats = world.manifests["chats"]
    tokens = [600, *chats.tokens.tolist()[1:]]
    message = (
        r"1 of 36 samples \(chats: 1\) do not fit stage.sequence_length=512 \(longest: 600\); raise"
    )
    with pytest.raises(PlanError, match=message):
        build_plan({**world.manifests, "chats": with_tokens(chats, tokens)}, WEIGHTS, toys.stage())
    with pytest.raises(PlanError, match=r"max_tiles_per_pack=3 \(most tiles: \d+\)"):
        build_plan(world.manifests, WEIGHTS, toys.stage(max_tiles_per_pack=3))


def test_the_document_multiple_counts_for_pairs_twice(world: World) -> None:
    stage = toys.stage(objective="dpo", document_multiple=64, sequence_length=1024)
    plan = build_plan(world.manifests, {"pairs": 1.0}, stage)
    lengths = padded_tokens(world.manifests["pairs"], 64)
    assert (lengths % 64 == 0).all() and (lengths >= 128).all()
    for pack in plan.packs(0):
        assert lengths[pack[:, 1]].sum() <= 1024


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
    world: World, weights: dict[str, float], objective: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        build_plan(world.manifests, weights, toys.stage(objective=objective))


def test_data_sets_of_different_tokenizers(world: World) -> None:
    chats = world.manifests["chats"]
    other = dataclasses.replace(
        chats, info=dataclasses.replace(chats.info, tokenizer_digest="f" * 64)
    )
    with pytest.raises(PlanError, match="differ in tokenizer_digest; build both again"):
        build_plan({**world.manifests, "chats": other}, WEIGHTS, toys.stage())
