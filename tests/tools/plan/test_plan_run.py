"""`make plan`: what it prints and writes, without torch."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf.check import check
from conf.compose import compose, options
from conf.schema import ParallelConfig
from slurm.estimate import estimate
from tools.command import run
from tools.plan.alternatives import nearest_preset, preset, ranked, runs
from tools.plan.predict import predict
from tools.plan_run import main

REPOSITORY = Path(__file__).parents[3]
REAL = ["model=amalia_vl_9b", "data=amalia", "cluster=mn5"]


def test_no_torch_is_imported() -> None:
    program = (
        "import sys; from tools.plan_run import main; "
        f"main({[*REAL, 'alternatives=2']!r}); "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for word in ("stage1:", "stage2:", "stage3:", "memory", "GPU-hours", "gpu_hours=", "  *  "):
        assert word in done.stdout


def test_json_has_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = [*REAL, "stages=[stage2,stage3]", f"json={file}", "alternatives=3", "stage2:tiles=9"]
    assert run(main, words) == 0
    stages = json.loads(file.read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["stage2", "stage3"]
    assert stages[0]["row"]["tiles"] == 9 != stages[1]["row"]["tiles"]
    for stage in stages:
        parts = sum(stage["memory_bytes"].values())
        assert parts == pytest.approx(stage["memory_total_bytes"])
        assert len(stage["alternatives"]) == 3 and stage["fits"]
    assert "stage2:stage.gpu_hours=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["cluster=local", "model=tiny"], "no prediction for cluster=local"),
        ([*REAL, "tiles=many"], "'many' is not a number"),
        ([*REAL, "fill=2"], "at most 1"),
        ([*REAL, "alternatives=-1"], "a number of rows"),
        ([*REAL, "parallel.tensor=3"], "not a multiple"),
    ],
)
def test_errors_are_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, words) == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_stage_that_does_not_fit_names_a_preset_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = ["parallel=single", "parallel.world_size=64", "precision=bf16"]
    assert run(main, [*REAL, "stages=[stage2]", *layout, "alternatives=0"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "preset   parallel=" in text
    name = text.split("preset   parallel=")[1].split()[0]
    config = compose([*REAL, "stage=stage2", f"parallel={name}", "precision=bf16"])
    assert predict(config).fit.fits and config.parallel.world_size == 64


def test_presets_are_read_as_hydra_reads_them() -> None:
    assert all(isinstance(preset(name), ParallelConfig) for name in options("parallel"))
    for name in ("h100_64", "tp2_sp"):
        assert preset(name) == compose([f"parallel={name}"]).parallel


def test_every_alternative_runs_and_fits() -> None:
    config = compose([*REAL, "stage=stage2", "precision=bf16"])
    chosen = predict(config)
    found = ranked(config, {}, chosen.row, 10)
    speeds = [one.step.tokens_per_gpu for one in found]
    assert len(found) == 10 and speeds == sorted(speeds, reverse=True)
    for one in found:
        check(one.config, dry=True)
        assert one.fit.fits and one.config.parallel.world_size == config.parallel.world_size
    assert sum(one.config.precision == config.precision for one in found) >= 5


def test_nearest_preset_fits_and_runs() -> None:
    config = compose([*REAL, "stage=stage2", "precision=bf16"])
    small = dataclasses.replace(config.cluster, gpu_memory_gb=20)
    near = nearest_preset(config, {}, predict(config).row)
    assert near is not None and near[1].fit.fits and runs(near[1].config)
    config = dataclasses.replace(config, cluster=small)
    near = nearest_preset(config, {}, predict(config).row)
    assert near is None or near[1].fit.fits


def test_submitted_hours_give_the_predicted_walltime() -> None:
    """stage.gpu_hours counts H100s, the plan this cluster's GPUs: the chain must come out alike."""
    config = compose(["model=amalia_vl_9b", "data=amalia", "cluster=leonardo", "stage=stage2"])
    found = predict(config).cost
    given = dataclasses.replace(config.stage, gpu_hours=found.submit_gpu_hours)
    again = estimate(dataclasses.replace(config, stage=given), Path("nowhere"))
    assert again.hours == pytest.approx(found.hours)
    assert again.segments == found.segments.segments > 1


def test_a_checkpoint_holds_weights_and_states() -> None:
    config = compose([*REAL, "stage=stage1", "precision=bf16"])
    trained = 1152 * 4096 + 4096 * 4096 + 3 * 4096
    assert predict(config).cost.disk.checkpoint == 2 * 9_587_370_224 + 12 * trained
