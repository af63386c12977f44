"""Transformer Engine's layers against local ones, as far as that goes without a GPU.

Runs wherever Transformer Engine imports (it needs torch with CUDA, not a GPU); see
tests/models/te_probe.py for how. What runs the layers is in test_transformer_engine_gpu.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
RECIPES = ("tensorwise", "blockwise", "delayed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("te_probe")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.te_probe", str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_layers_are_the_fused_ones(report: dict[str, Any]) -> None:
    fused = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    assert fused <= set(report["kinds"])
    assert report["final_norm"] == "transformer_engine RMSNorm"
    assert report["fusions"] == {
        "decoder": {"apply_rope_fusion": True, "bias_activation_fusion": True},
        "vision": {"apply_rope_fusion": False, "bias_activation_fusion": True},
    }


def test_packed_rows_and_tiles_get_the_mask_that_their_kernels_take(report: dict[str, Any]) -> None:
    decoder, vision = report["attention"]["decoder"], report["attention"]["vision"]
    assert (decoder["format"], decoder["mask"]) == ("thd", "padding_causal")
    assert (vision["format"], vision["mask"]) == ("sbhd", "no_mask")
    assert report["attention"]["vision_head_dim"] == 72


def test_checkpoints_hold_the_same_tensors(report: dict[str, Any]) -> None:
    assert len(report["tiny"]["local"]) > 40
    assert report["tiny"]["te"] == report["tiny"]["local"]
    for recipe in ("None", *RECIPES):
        assert report["real"][recipe] == report["real"]["local"], recipe


def test_ranks_of_larger_jobs_hold_the_same_tensors_too(report: dict[str, Any]) -> None:
    for rank in ("1 of 4", "6 of 8"):  # TP 4; TP 2, PP 2, CP 2 (the last stage has no embedding)
        te, local = report["ranks"][rank]
        assert te == local and te, rank
    assert len(report["ranks"]["6 of 8"][0]) < len(report["ranks"]["1 of 4"][0])


def test_the_same_gradients_are_summed_over_tensor_parallel_ranks(report: dict[str, Any]) -> None:
    """With sequence parallelism each rank sees a part of the tokens that the norms see."""
    te, local = report["ranks"]["marks"]
    assert te == local and len(local) == 2 * 4 + 1  # two norms a layer, and the last


def test_a_checkpoint_loads_into_the_other_kind(report: dict[str, Any]) -> None:
    assert report["local_into_te"] and report["te_into_local"] and report["delayed_into_local"]


def test_each_recipe_runs_in_its_scope(report: dict[str, Any]) -> None:
    layers = 4
    assert report["scopes"]["tensorwise"] == ["Float8CurrentScaling HYBRID"] * layers
    assert report["scopes"]["blockwise"] == ["Float8BlockScaling E4M3"] * layers
    assert report["scopes"]["delayed"] == ["TEDelayedScaling HYBRID 1024 max"] * layers


def test_layers_at_either_end_stay_in_bf16(report: dict[str, Any]) -> None:
    """One at the beginning and two at the end of four."""
    current = "Float8CurrentScaling HYBRID"
    assert report["scopes"]["ends"] == ["bf16", current, "bf16", "bf16"]
    assert report["in_fp8"] == [False, True, False, False]


def test_what_would_be_bf16_is_refused(report: dict[str, Any]) -> None:
    refused = report["refused"]
    assert "ColumnParallelLinear" in refused["local layers"]
    assert "layer 1 would train in BF16" in refused["no scope"]
    assert "capability 8.9 or higher" in refused["tensorwise on (8, 0)"]
    assert "capability 9.0 or higher" in refused["blockwise on (8, 9)"]


def test_delayed_finds_its_history_again_only_in_its_own_checkpoint(
    report: dict[str, Any],
) -> None:
    assert report["history"] and not report["history_of_predecessor"]


def test_gradient_accumulation_is_fused_in_the_decoder_only(report: dict[str, Any]) -> None:
    assert report["fused"] == {"decoder": [True], "vision": [False]}


def test_our_row_rule_is_what_transformer_engine_asserts(report: dict[str, Any]) -> None:
    from conf.alignment import FP8_MULTIPLES

    seen = set()
    for rows, columns, blockwise, accepted in report["rule"]:
        multiple = FP8_MULTIPLES["blockwise" if blockwise else "tensorwise"]
        assert accepted == (rows % multiple == 0 and columns % multiple == 0), (rows, columns)
        seen.add(accepted)
    assert seen == {True, False}
