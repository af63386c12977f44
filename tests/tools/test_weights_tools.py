"""Comparing and averaging weights of either format, against plain torch."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint_files import step_directory
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.checkpoint_writer import LazyPart, write_checkpoint
from pipeline.files import digest_and_fsync
from pipeline.handoff import DONE, read_done, write_done
from pipeline.manifest import MANIFEST, read_manifest
from tests.tools.small_backbones import OVERRIDES
from tests.tools.weights import read_weights
from tools import average_checkpoints, diff_checkpoints, hf_export, hf_import
from tools.command import run

NAME = "language_model.model.layers.2.mlp.up_proj.weight"


def test_the_two_formats_are_equal(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"a={run_directory / 'import'}", f"b={run_directory / 'hf'}"]
    assert run(diff_checkpoints.main, words) == 0
    assert "all 97 tensors are equal bit for bit" in capsys.readouterr().out


def test_what_differs_is_named_and_measured(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_directory / "hf", tmp_path / "other")
    tensors = read_weights(tmp_path / "other")
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME][3, 5] += 0.25
    norm = float(read_weights(run_directory / "hf")[NAME].double().norm())
    del tensors["image_newline"]
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    checkpoint = run_directory / "import" / read_done(run_directory / "import").checkpoint
    assert run(diff_checkpoints.main, [f"a={checkpoint}", f"b={tmp_path / 'other'}"]) == 1
    said = capsys.readouterr()
    assert "image_newline: only in A, [32]" in said.out
    assert f"{NAME}: largest 0.25, relative {0.25 / norm:.3g}, 0.08% of the numbers" in said.out
    assert "2 tensors differ, 95 are equal" in said.err


def test_mean_of_the_last_checkpoints(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = read_weights(run_directory / "hf")
    stage = tmp_path / "stage"
    draw = torch.Generator().manual_seed(3)
    kept: list[dict[str, torch.Tensor]] = []
    for step in (1, 2, 3):
        shutil.copytree(run_directory / "hf", tmp_path / f"hf{step}")
        moved = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in original.items()
        }
        save_file(moved, tmp_path / f"hf{step}/model.safetensors", metadata={"format": "pt"})
        words = [f"llava={tmp_path / f'hf{step}'}", f"out={tmp_path / f'import{step}'}"]
        assert run(hf_import.main, [*OVERRIDES, *words]) == 0
        source = step_directory(tmp_path / f"import{step}", 0)
        manifest = json.loads((source / MANIFEST).read_text())
        (source / MANIFEST).write_text(json.dumps({**manifest, "step": step}))
        shutil.copytree(source, step_directory(stage, step))
        kept.append(moved)
    newest = step_directory(stage, 3)
    done = read_done(tmp_path / "import1")
    digest = digest_and_fsync(newest / MANIFEST)[1]
    changes = {"checkpoint": str(newest.relative_to(stage)), "checkpoint_digest": digest}
    write_done(stage, replace(done, **changes))  # type: ignore[arg-type]
    words = [f"stage={stage}", f"out={tmp_path / 'mean'}"]
    assert run(average_checkpoints.main, [*words, "last=2"]) == 0
    tokenizer = f"tokenizer={run_directory / 'import/tokenizer'}"
    export = [f"stage={tmp_path / 'mean'}", f"out={tmp_path / 'mean_hf'}", tokenizer]
    assert run(hf_export.main, export) == 0
    mean = read_weights(tmp_path / "mean_hf")
    for name, tensor in mean.items():
        expected = (kept[1][name].double() + kept[2][name].double()) / 2
        assert torch.equal(tensor, expected.float()), name
    capsys.readouterr()
    assert run(average_checkpoints.main, [f"stage={stage}", "last=4", f"out={tmp_path / 'x'}"]) == 1
    assert "keeps 3 checkpoints, not 4" in capsys.readouterr().err


def test_checkpoints_of_different_models_have_no_mean(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = tmp_path / "stage"
    source = step_directory(run_directory / "import", 0)
    with CheckpointTensors(source) as tensors:
        parts = []
        for name in tensors.names():
            shape = tensors.stored_shape(name)
            rows = (0,) * len(shape)
            numbers = tensors.read_part(name, rows, shape)
            if name == "image_newline":
                numbers = numbers.bfloat16()
            part = LazyPart(name, shape, rows, shape, numbers.dtype, numbers.clone)
            parts.append(part)
    manifest = replace(read_manifest(source), files={})
    write_checkpoint(parts, stage, replace(manifest, step=1), workers=2)
    shutil.copytree(source, step_directory(stage, 2))
    shutil.copyfile(run_directory / "import" / DONE, stage / DONE)
    words = [f"stage={stage}", f"out={tmp_path / 'mean'}"]
    assert run(average_checkpoints.main, words) == 1
    assert "step_00000002 holds other tensors than step_00000001" in capsys.readouterr().err
    shutil.rmtree(step_directory(stage, 1))
    write_checkpoint(parts[1:], tmp_path / "less", replace(manifest, step=1), workers=2)
    shutil.copytree(step_directory(tmp_path / "less", 1), step_directory(stage, 1))
    assert run(average_checkpoints.main, words) == 1
    assert f"step_00000001 holds no {parts[0].name}" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".*"))
