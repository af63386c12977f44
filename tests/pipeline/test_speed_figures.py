"""The figures of speed in the metrics of real runs."""

import pytest

from pipeline.timers import KINDS
from tests.pipeline.small_run import SmallRun, metrics, train_in_pool


def test_the_kinds_add_up_to_the_step(small_run: SmallRun, trained: dict[str, str]) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        for line in metrics(small_run.config(stage)):
            parts = {kind: line[f"seconds_{kind}"] for kind in KINDS}
            # Rounded to a microsecond each; and the first step's clocks start one after the other.
            assert sum(parts.values()) == pytest.approx(line["seconds"], abs=1e-3)
            assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0
            assert line["tokens_per_second"] == pytest.approx(
                line["tokens"] / line["seconds"], rel=1e-3
            )
            assert 0 < line["effective_tokens"] <= 1
            assert line["mfu"] is None and line["tflops_per_gpu"] > 0
            assert line["imbalance"] == {"attention": 1, "tiles": 1, "flops": 1}
            assert line["peak_memory_gib"] > 0.1


def test_a_save_counts_in_the_step_after(small_run: SmallRun, trained: dict[str, str]) -> None:
    """Saved after steps 2, 4 and 6; and what waits for the disk does not wait for data."""
    for line in metrics(small_run.config("stage2")):
        saved = line["seconds_checkpoint"]
        assert (saved > 0.01) == (line["step"] in (3, 5))
        assert line["seconds_data_max"] <= line["seconds"] - saved


def test_replicas_and_stages(small_run: SmallRun) -> None:
    config = small_run.config("stage1", "parallel=pp2_dp2", "stage.steps=2", run="speed")
    train_in_pool(config)
    for line in metrics(config):
        assert line["imbalance"]["flops"] > 1
        assert line["seconds_communication"] > 0, "pipeline and gradients"
        assert 0 <= line["data_rank"] < 4
        assert sum(line[f"seconds_{kind}"] for kind in KINDS) == pytest.approx(
            line["seconds"], abs=1e-3
        )
