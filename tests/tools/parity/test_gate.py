"""The gate lets a true export pass and names what is wrong with every other one.

Each fault is planted as a faulty converter would make it: with checksums that fit. Both networks
run in this process here; the last test runs the command, which gives each its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conf.compose import compose
from data_shards import images
from slurm.local import free_port
from tests.tools.small_backbones import OVERRIDES, write_backbones
from tests.tools.weights import read_weights
from tools import hf_export, hf_import, parity_gate
from tools.command import run
from tools.parity import hf_side, megatron_rank, network

TOKENS = 8
THETA = 500_000.0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`import/` with a RoPE base of its own, and `hf/`."""
    root = tmp_path_factory.mktemp("gate")
    vision, language, tokenizer = write_backbones(root / "backbones")
    change_json(language / "config.json", lambda config: config.update(rope_theta=THETA))
    words = [f"vision={vision}", f"language={language}", f"tokenizer={tokenizer}"]
    words += [f"model.text.rope_theta={THETA}", f"out={root / 'import'}"]
    assert run(hf_import.main, [*OVERRIDES, *words]) == 0
    assert run(hf_export.main, [f"stage={root / 'import'}", f"out={root / 'hf'}"]) == 0
    return root / "import"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides here instead of in processes that import torch each."""

    def call(command: list[str], environment: dict[str, str], failure: str, say: Any) -> None:
        if command[1].endswith("hf_side.py"):
            hf_side.main(command[2:])
            return
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }.items():
            monkeypatch.setenv(name, value)
        megatron_rank.main(command[-1:])

    monkeypatch.setattr(network, "_run", call)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = read_weights(folder)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "language_model.model.layers.1."


def transposed_qkv(folder: Path) -> None:
    name = f"{LAYER}self_attn.q_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].T}))


def interleaved_rope(folder: Path) -> None:
    """Rows of each head as (0, half, 1, half + 1, ...), GPT-J's order instead of Llama's."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in "qk":
            name = f"{LAYER}self_attn.{part}_proj.weight"
            heads = tensors[name].view(-1, 2, 4, 32)  # head, half, pair, hidden
            tensors[name] = heads.transpose(1, 2).reshape(-1, 32)

    change_weights(folder, change)


def swapped_gate_and_up(folder: Path) -> None:
    gate, up = (f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    change_weights(folder, change)


def missing_newline(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["image_newline"].zero_())


def foreign_tensor(folder: Path) -> None:
    name = f"{LAYER}mlp.down_proj.weight"
    other = torch.randn(32, 40, generator=torch.Generator().manual_seed(9)) * 0.05
    change_weights(folder, lambda tensors: tensors.update({name: other}))


def wrong_feature_layer(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(vision_feature_layer=-1))


def lost_theta(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config["text_config"].pop("rope_theta"))


def bos_twice(folder: Path) -> None:
    change_json(
        folder / "tokenizer.json",
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            }
        ),
    )


WEIGHTS = {"weights, out", "weights, back", "logits"}
FAULTS: dict[Callable[[Path], None], set[str]] = {
    transposed_qkv: WEIGHTS,
    interleaved_rope: WEIGHTS,
    swapped_gate_and_up: WEIGHTS,
    missing_newline: {*WEIGHTS, "image features"},
    foreign_tensor: WEIGHTS,
    wrong_feature_layer: {"settings", "image features", "logits"},
    lost_theta: {"settings", "logits"},
    bos_twice: {"chats"},
}


def failures(stage: Path, folder: Path) -> dict[str, str]:
    found = parity_gate.check(stage, folder, compose(OVERRIDES), Path(sys.executable), TOKENS)
    return {finding.name: finding.detail for finding in found if not finding.passed}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_planted_fault_is_named(stage: Path, tmp_path: Path, plant: Callable[[Path], None]) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(stage.parent / "hf", folder)
    plant(folder)
    (folder / "SHA256SUMS").unlink()
    hf_export.write_checksums(folder, {})
    found = failures(stage, folder)
    assert FAULTS[plant] <= set(found), found


@pytest.mark.usefixtures("in_process")
def test_tiles_one_further_are_noticed(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = images.write_tiles_from

    def shifted(data: bytes, height: int, width: int, geometry: Any, out_NCHW: np.ndarray) -> None:
        written(data, height, width, geometry, out_NCHW)
        out_NCHW[1:] = np.roll(out_NCHW[1:], 1, axis=0)

    monkeypatch.setattr(images, "write_tiles_from", shifted)
    found = failures(stage, stage.parent / "hf")
    assert {"pixels", "image features", "logits"} <= set(found), found


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_pass_and_are_said(stage: Path, tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "hf"
    assert run(hf_export.main, [f"stage={stage}", f"out={folder}", f"dtype={dtype}"]) == 0
    found = parity_gate.check(stage, folder, compose(OVERRIDES), Path(sys.executable), TOKENS)
    assert not [finding for finding in found if not finding.passed]
    (weights,) = [finding for finding in found if finding.name == "weights, out"]
    assert weights.detail.endswith(f"rounded from float32 to {dtype}")


@pytest.mark.usefixtures("in_process")
def test_an_end_token_within_the_answer_is_held_back_on_both_sides(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(stage.parent / "hf", folder)
    original, seen = network._greedy, dict[str, Any]()

    def spy(ours: Any, theirs: Any, sides: Any) -> Any:
        seen.update(theirs)
        return original(ours, theirs, sides)

    monkeypatch.setattr(network, "_greedy", spy)
    assert not failures(stage, folder)
    end = int(seen["text only"]["ids"][-TOKENS])  # the answer's first token
    change_json(folder / "generation_config.json", lambda config: config.update(eos_token_id=end))
    (folder / "SHA256SUMS").unlink()
    hf_export.write_checksums(folder, {})
    assert set(failures(stage, folder)) == {"settings"}
    assert end not in seen["text only"]["ids"][-TOKENS:]


def test_changed_file_and_missing_file_are_named(stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(stage.parent / "hf", folder)
    (folder / "generation_config.json").write_text("{}")
    (folder / "preprocessor_config.json").unlink()
    config = compose(OVERRIDES)
    found = parity_gate.check(stage, folder, config, Path(sys.executable), only="files")
    problems = {finding.name: finding.detail for finding in found if not finding.passed}
    assert "generation_config.json was changed" in problems["checksums"]
    assert "preprocessor_config.json is missing" in problems["settings"]


@pytest.mark.slow
def test_the_command_certifies_a_true_export_once(stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(stage.parent / "hf", folder)
    command = [sys.executable, "-m", "tools.parity_gate", f"stage={stage}", f"hf={folder}"]
    done = subprocess.run(
        [*command, "parallel=tp2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    certificate = json.loads((folder / "parity.json").read_text())
    assert certificate["layout"] == "tensor=2 pipeline=1 virtual_pipeline=1"
    assert all(finding["passed"] for finding in certificate["findings"])
    assert parity_gate.certified(folder)
    (folder / "SHA256SUMS").write_text("another\n")
    assert not parity_gate.certified(folder)
