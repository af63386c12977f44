"""Each mistake, planted in the true code, is found and named."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.llava_next import LlavaNext
from pipeline.objectives.sft import SupervisedObjective
from tests.tools.dryrun.layouts import simulate_sample, tiny_config
from tools.dryrun import collectives, sharding
from tools.dryrun.page import problems
from tools.dryrun.rank import simulate


def test_a_rank_that_skips_a_collective_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = SupervisedObjective.loss

    def counting_images(self: Any, batch: Any, token_losses_T: Tensor) -> Any:
        if len(batch.image_positions_P):
            dist.all_reduce(torch.tensor(len(batch.image_positions_P)))
        return loss(self, batch, token_losses_T)

    monkeypatch.setattr(SupervisedObjective, "loss", counting_images)
    stepped, _ = simulate_sample(tiny_config(world_size=2))
    (problem,) = problems(stepped, [], whole_checkpoint=True)
    assert "world [0, 1], call" in problem
    assert "rank 0 asks for all_reduce sum int64 [1]" in problem and "rank 1 asks for" in problem


def test_a_vision_tower_that_is_not_run_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reduction that waits for all gradients of a bucket would wait for ever."""
    table = LlavaNext.feature_table

    def sparing(self: Any, tiles_NCHW: Tensor) -> Tensor:
        if len(tiles_NCHW) > 1:
            return table(self, tiles_NCHW)
        rows = self.vision_tower.grid**2 + 1
        return self.image_newline[None].expand(rows, -1)

    monkeypatch.setattr(LlavaNext, "feature_table", sparing)
    stepped, _ = simulate_sample(tiny_config(world_size=2))
    found = problems(stepped, [], whole_checkpoint=False)
    assert found[0].startswith("freezing: rank 1 (tp0 cp0 dp1 pp0), vision: 39 trainable")
    assert "got no gradient from the micro-batches text, text" in found[0]


def test_pipeline_stages_of_different_shapes() -> None:
    config = tiny_config(world_size=2, pipeline=2)
    shorter = dataclasses.replace(
        config, stage=dataclasses.replace(config.stage, sequence_length=256)
    )
    reports = [simulate(config, 0), simulate(shorter, 1)]
    assert [report.error for report in reports] == ["", ""]
    found = collectives.differences(reports)
    assert len(found) == 2  # forward and backward
    assert "pipeline [0, 1], transfer 0 from rank 0 to 1: the sender asks for send" in found[0]
    assert "[320x1x64]" in found[0] and "[256x1x64]" in found[0]


@pytest.mark.parametrize(
    ("replica", "said"),
    [(0, "is written by ranks 0, 1"), (1, "of 64 numbers of float32 [64] the ranks write 0")],
)
def test_a_tensor_that_is_saved_twice_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, replica: int, said: str
) -> None:
    sharded = LlavaNext.sharded_state_dict

    def mistaken(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = sharded(self, *args, **kwargs)
        state["image_newline"] = dataclasses.replace(
            state["image_newline"], replica_id=(0, replica, 0)
        )
        return state

    monkeypatch.setattr(LlavaNext, "sharded_state_dict", mistaken)
    stepped, _ = simulate_sample(tiny_config("stage1", world_size=2, tensor=2))
    found = sharding.problems(stepped)
    assert found and all("image_newline" in line for line in found)
    assert said in found[0]


def test_heads_that_the_ranks_do_not_divide() -> None:
    stepped, _ = simulate_sample(tiny_config(world_size=3, tensor=3))
    (problem,) = problems(stepped, [], whole_checkpoint=True)
    assert "rank 0 (tp0 cp0 dp0 pp0), model:" in problem and "(3 ranks alike)" in problem
    assert "must be a multiple of tensor_model_parallel_size" in problem


def test_a_frozen_module_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters ask for a gradient after the buffers were laid out."""
    from tools.dryrun import rank

    build = rank.build_training_model

    def thawed(config: Any) -> Any:
        models = build(config)
        models[0].module.language_model.output_layer.weight.requires_grad_(True)
        return models

    monkeypatch.setattr(rank, "build_training_model", thawed)
    found = problems([simulate(tiny_config("stage1"), 0)], [], whole_checkpoint=False)
    assert any("language" in line and "have a gradient buffer" in line for line in found)
