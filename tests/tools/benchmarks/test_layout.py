"""The same documents in each side's arrangement, and rows made without data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.anyres import AnyresGeometry
from tests.models.tiny import tiny_model
from tools.benchmarks.batches import read_batches, write_batches
from tools.benchmarks.documents import IGNORED, lay, padded_for_transformers, split
from tools.benchmarks.sides import our_training, transformers_training
from tools.benchmarks.stage2 import GROUPED, PACKED, PADDED, PLAIN, grouped_order
from tools.benchmarks.synthetic import Mixture, packed_row, row_documents
from tools.benchmarks.training import training_config
from tools.benchmarks.turns import Side, take_turns

MODEL = tiny_model()
GEOMETRY = AnyresGeometry.from_model(MODEL)
MIXTURE = Mixture(images=((32, 32), (64, 40), (33, 70)), text=12, documents=(30, 12))
LENGTH = 256


def _documents(batch: object) -> list:
    made = row_documents(MODEL, LENGTH, MIXTURE)
    sizes = [[size] if size else [] for _, size in made]
    return split(batch, [tokens for tokens, _ in made], sizes, GEOMETRY)  # type: ignore[arg-type]


def test_a_row_taken_apart_and_laid_again_is_the_row() -> None:
    batch = packed_row(MODEL, LENGTH, MIXTURE, seed=3)
    documents = _documents(batch)
    again = lay([documents], LENGTH, GEOMETRY, pad_id=0, multiple=8)
    assert again.equals(batch)
    assert sum(document.targets for document in documents) == batch.loss_mask_T.sum()


def test_a_synthetic_row_is_consistent() -> None:
    batch = packed_row(MODEL, LENGTH, MIXTURE, seed=3)
    assert len(batch.tokens_T) == batch.cu_seqlens[-1] == LENGTH
    assert (batch.tokens_T[batch.image_positions_P] == MODEL.image_token_id).all()
    assert (batch.tokens_T == MODEL.image_token_id).sum() == len(batch.image_positions_P)
    table = len(batch.tiles_NCHW) * GEOMETRY.grid**2
    assert set(batch.image_rows_P.tolist()) <= set(range(table + 1))
    targets = np.flatnonzero(batch.loss_mask_T)
    assert (batch.labels_T[targets] == batch.tokens_T[targets + 1]).all()
    assert not batch.loss_mask_T[batch.cu_seqlens[1:] - 1].any(), "a target across documents"
    assert batch.n_images == 2  # the third would take more than its share
    pairs = packed_row(MODEL, LENGTH, Mixture(MIXTURE.images, 12, (30,), pairs=True), seed=0)
    lengths = np.diff(pairs.cu_seqlens)
    assert len(pairs.pairs) == len(pairs.sample_ids)
    assert (lengths[pairs.pairs[:, 0]] == lengths[pairs.pairs[:, 1]]).all()


def test_a_row_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="no document fits a row of 8 tokens"):
        packed_row(MODEL, 8, MIXTURE, seed=0)


def test_batches_survive_their_file(tmp_path: Path) -> None:
    steps = [[packed_row(MODEL, LENGTH, MIXTURE, seed)] for seed in range(12)]
    path = tmp_path / "batches.npz"
    write_batches(path, steps)
    found = read_batches(path, most_steps=11)
    assert len(found) == 11
    assert all(a[0].equals(b[0]) for a, b in zip(steps, found, strict=False))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not hold packed batches.*demo_batches"):
        read_batches(path)


def test_padding_on_the_right() -> None:
    documents = _documents(packed_row(MODEL, LENGTH, MIXTURE, seed=3))
    inputs = padded_for_transformers(documents, pad_id=0)
    assert inputs["input_ids"].shape == (len(documents), max(map(len, documents)))
    assert inputs["attention_mask"].sum(1).tolist() == [len(d) for d in documents]
    assert int((inputs["labels"] != IGNORED).sum()) == sum(d.targets for d in documents)
    kept = inputs["labels"] != IGNORED
    assert torch.equal(inputs["labels"][kept], inputs["input_ids"][kept]), "labels are shifted"
    assert inputs["pixel_values"].shape[0] == len(inputs["image_sizes"]) == 2


def test_grouping_pads_as_little_as_possible() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 101).tolist()
    order = grouped_order(lengths, 8, seed=0)
    assert sorted(order) == list(range(101))
    ordered = [lengths[number] for number in order]
    assert ordered == sorted(lengths, reverse=True)


def test_both_sides_train_on_the_same_loss() -> None:
    """Two real processes, one turn each: transformers' loss and ours before training."""
    batch = packed_row(MODEL, LENGTH, MIXTURE, seed=3)
    documents = _documents(batch)
    from conf.schema import ParallelConfig, PrecisionConfig

    config = training_config(MODEL, ParallelConfig(), PrecisionConfig(), LENGTH)
    shared = {"model": MODEL, "config": config, "threads": 1}
    theirs = {"batches": [documents], "accumulation": 1, "check": documents}
    ours = {"steps": [[batch]], "counts": {"tokens": 1.0}, "check": batch}
    sides = [
        Side(PLAIN, transformers_training, {**shared, **theirs}),
        Side(PACKED, our_training, {**shared, **ours}),
    ]
    taken = take_turns(sides, turns=1, warm_up=0)
    losses = [taken.value(side, "check_loss") for side in (PLAIN, PACKED)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert taken.value(PLAIN, "tokens") == sum(map(len, documents))
    assert {PLAIN, GROUPED, PACKED, PADDED} > set(taken.reports)
