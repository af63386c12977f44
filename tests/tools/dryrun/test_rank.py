"""Simulated ranks against real ones, and good layouts."""

import pytest

from tests.distributed import run_ranks
from tests.tools.dryrun.layouts import simulate_sample, tiny_config
from tests.tools.dryrun.real_ranks import real_step
from tools.dryrun.page import problems
from tools.dryrun.rank import simulate

DISTRIBUTED = {
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2, "pipeline": 2},
        {"context": 2, **DISTRIBUTED},  # and two replicas, one of them without images
    ],
    ids=["tp2-pp2", "cp2-dp2-distributed"],
)
def test_foresees_what_real_ranks_are_asked(layout: dict) -> None:
    """Every call of a step in order, with dtype and count, and the bytes of four gloo ranks."""
    config = tiny_config(world_size=4, **layout)
    for rank, (calls, sizes) in enumerate(run_ranks(4, real_step, config)):
        report = simulate(config, rank)
        assert report.error == ""
        foreseen = [
            (call.op.split()[0], call.dtype, call.numel)
            for call in report.calls
            if call.phase == "step" and call.op != "barrier"
        ]
        assert foreseen == calls
        assert report.bytes == sizes


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        (
            "stage2",
            {
                "world_size": 16,
                "tensor": 2,
                "pipeline": 2,
                "context": 2,
                "sequence_parallel": True,
                **DISTRIBUTED,
            },
        ),
        (
            "stage3",
            {"world_size": 4, "pipeline": 2, "virtual_pipeline": 2, "recompute": "full"},
        ),
        ("stage1", {"world_size": 4, "pipeline": 2, "distributed_optimizer": True}),
    ],
    ids=["tp2-pp2-cp2-dp2", "pp2-virtual2-dp2-dpo", "pp2-dp2-frozen"],
)
def test_good_layouts_have_nothing_wrong(stage: str, layout: dict) -> None:
    config = tiny_config(stage, **layout)
    stepped, writers = simulate_sample(config)
    assert problems(stepped, writers, whole_checkpoint=True) == []
    kinds = {report.kinds for report in stepped}
    assert any(set(kind) == {"text"} for kind in kinds) and any("heaviest" in k for k in kinds)
    if stage == "stage1":  # the last pipeline stage has nothing to train
        last = [report for report in stepped if report.coordinates.pipeline == 1]
        assert all(part.trainable == 0 for report in last for part in report.modules.values())
        assert all(report.bytes["gradients"] == report.bytes["optimizer"] == 0 for report in last)
