"""What may change when a run goes on."""

import pytest

from conf.compare import changed
from conf.compose import compose


@pytest.mark.parametrize(
    "override",
    [
        "parallel=tp2",
        "cluster.threads_per_rank=2",
        "precision.grad_reduce_in_fp32=false",
        "stage.log_every=1",
        "stage.micro_batch_size=1",
        "stage.checkpoint.every=3",
        "data.root=elsewhere",
        "data.sources.captions.input=elsewhere/*.parquet",
        "run=other",
    ],
)
def test_layout_and_places_may_change(override: str) -> None:
    assert changed(compose(), compose([override])) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.vision.layers=5", "model.vision.layers: 4 -> 5"),
        ("precision.params=bf16", "precision.params: fp32 -> bf16"),
        ("stage.seed=1", "stage.seed: 1234 -> 1"),
        ("stage.steps=9", "stage.steps: 150 -> 9"),
        ("stage.global_batch_size=16", "stage.global_batch_size: 8 -> 16"),
        ("data.mix.stage1.captions=2", "data.mix.stage1.captions: 1.0 -> 2.0"),
        ("+data.mix.stage1.chats=1", "data.mix.stage1.chats: absent -> 1.0"),
        ("~data.mix.stage3", "data.mix.stage3.preferences: 1.0 -> absent"),
        ("init_from=there", "init_from: None -> there"),
        (
            "parallel.distributed_optimizer=true",
            "parallel.distributed_optimizer: False -> True",
        ),
    ],
)
def test_what_makes_the_weights_may_not(override: str, line: str) -> None:
    assert changed(compose(), compose([override])) == [line]
