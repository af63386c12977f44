"""What a step holds by the manifests is what the loaders of all replicas deliver."""

from dataclasses import replace

import pytest

from models.flops import causal_pairs, forward_flops, training_flops
from pipeline.callbacks.base import BatchCounts
from pipeline.callbacks.throughput import Throughput
from pipeline.data import StageData, open_data, pack_cost
from pipeline.distributed import Ranks
from tests.pipeline.small_run import SmallRun

STEPS = 3


def opened(run: SmallRun, stage: str, replicas: int) -> list[StageData]:
    """The data of each replica."""
    config = run.config(stage)
    config.data.load_workers = 0
    ranks = [
        Ranks(r, replicas, "cpu", r, replicas, 0, 1, True, True, r == 0)  # type: ignore[arg-type]
        for r in range(replicas)
    ]
    first = open_data(config, ranks[0])
    return [replace(first, ranks=each) for each in ranks]


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
@pytest.mark.parametrize("replicas", [1, 4])
def test_counts_are_what_the_loaders_deliver(
    small_run: SmallRun, stage: str, replicas: int
) -> None:
    data = opened(small_run, stage, replicas)
    delivered = [dict(zip(range(STEPS), each.batches(0), strict=False)) for each in data]
    for step in range(STEPS):
        counts = data[0].counts(step, masked=0)
        assert counts == data[-1].counts(step, masked=0), "known to all ranks alike"
        total = BatchCounts(0, 0, 0, 0, 0)
        for work, batches in zip(counts.replicas, delivered, strict=True):
            micro_batches = batches[step][1]
            # The images' tokens and the text's; documents are padded with the pad token.
            lengths = [n for each in micro_batches for n in real_lengths(each, data[0])]
            assert work.tokens == sum(lengths)
            assert work.attended == causal_pairs(lengths)
            assert work.targets == sum(int(each.loss_mask_T.sum()) for each in micro_batches)
            shown = sum(len(each.tiles_NCHW) for each in micro_batches if each.n_images)
            assert work.tiles == shown
            total = replace(
                total,
                positions=total.positions + sum(len(each.tokens_T) for each in micro_batches),
                images=total.images + sum(each.n_images for each in micro_batches),
                samples=total.samples + sum(len(each.sample_ids) for each in micro_batches),
            )
        assert counts.positions == total.positions
        assert counts.images == total.images and counts.images > 0
        assert counts.samples == total.samples
        assert counts.tokens == sum(work.tokens for work in counts.replicas)
        assert counts.tiles == sum(work.tiles for work in counts.replicas)


def real_lengths(batch, data: StageData) -> list[int]:  # type: ignore[no-untyped-def]
    """Tokens of each document up to its last one that is no padding."""
    found = []
    for first, last in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        tokens = batch.tokens_T[first:last]
        kept = (tokens != data.tokenizer.pad_id).nonzero()[0]
        if len(kept):
            found.append(int(kept[-1]) + 1)
    return found


def test_flops_of_the_replicas_add_up_to_those_of_the_batch(small_run: SmallRun) -> None:
    config = small_run.config("stage2")
    (data,) = opened(small_run, "stage2", 1)
    four = opened(small_run, "stage2", 4)[0]
    throughput = Throughput(config)
    whole = throughput.training_flops(data.counts(0, 0).replicas[0])
    parts = [throughput.training_flops(work) for work in four.counts(0, 0).replicas]
    assert sum(part.total for part in parts) == pytest.approx(whole.total, rel=1e-12)
    _, batches = next(iter(data.batches(0)))
    lengths = [n for each in batches for n in real_lengths(each, data)]
    targets = sum(int(each.loss_mask_T.sum()) for each in batches)
    tiles = sum(len(each.tiles_NCHW) for each in batches if each.n_images)
    forward = forward_flops(config.model, lengths, targets, tiles)
    everything = {"vision", "connector", "language"}
    assert whole == training_flops(forward, everything)


def test_the_plan_lies_in_the_stages_directory_and_is_used_again(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run.config("stage3", run="planned")
    (rank,) = (each.ranks for each in opened(small_run, "stage3", 1))
    data = open_data(config, rank)
    folder = small_run.root / "planned" / "stage3" / "plan"
    kinds = sorted(path.name.split("-")[0] for path in folder.iterdir())
    assert kinds == ["sequential", "training"]
    assert sorted(map(tuple, data.everything.samples.tolist())) == [(0, n) for n in range(12)]
    monkeypatch.setattr("data_shards.plan_file.KINDS", {})  # no planner
    again = open_data(config, rank)
    assert again.plan.digest == data.plan.digest
    assert again.everything.digest == data.everything.digest


def test_replicas_are_levelled_by_what_the_stage_computes(small_run: SmallRun) -> None:
    """A frozen tower only runs forward, and gradients pass attention whatever trains before it."""
    config = small_run.config("stage2")
    model, everything = config.model, {"vision", "connector", "language"}
    cost = pack_cost(config)
    tile = forward_flops(model, [], 0, 1)
    assert cost.tile == training_flops(tile, everything).total
    two = forward_flops(model, [2], 0, 0).total - 2 * forward_flops(model, [1], 0, 0).total
    assert cost.pair == pytest.approx(3 * two)  # a document of two looks at one pair more
    config.stage.lr.vision = config.stage.lr.language = 0.0
    frozen = pack_cost(config)
    assert frozen.pair == cost.pair and tile.total < frozen.tile < 0.6 * cost.tile
