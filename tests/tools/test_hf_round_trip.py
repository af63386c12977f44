"""Import, export and import again: complete, loadable by transformers, bit for bit the same."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from conf.compose import compose
from models.anyres import AnyresGeometry
from models.hf_state import VOCABULARY_TABLES
from pipeline.handoff import read_done
from tests.tools.small_backbones import OVERRIDES, picture
from tests.tools.weights import read_weights
from tools import export_weights, hf_export, hf_import
from tools.command import run
from tools.hf_answers import ExportedModel
from tools.questions import Pair, Question


def test_import_is_a_finished_stage(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = read_done(run_directory / "import")
    arguments = [*OVERRIDES, "vision=x", "language=x", "tokenizer=x"]
    assert run(hf_import.main, [*arguments, f"out={run_directory / 'import'}"]) == 0
    assert "already imported" in capsys.readouterr().out
    assert (done.stage, done.number, done.step) == ("import", 0, 0)
    assert (run_directory / "import" / done.checkpoint / "MANIFEST.json").is_file()
    assert (run_directory / "import" / "tokenizer" / "chat_template.jinja").is_file()


def test_export_holds_the_backbones_bit_for_bit(run_directory: Path) -> None:
    exported = read_weights(run_directory / "hf")
    vision = load_file(run_directory / "backbones/vision/model.safetensors")
    language = load_file(run_directory / "backbones/language/model.safetensors")
    seen = set()
    for name, tensor in vision.items():
        if ".head." not in name:
            assert torch.equal(exported[f"vision_tower.{name}"], tensor), name
            seen.add(f"vision_tower.{name}")
    for name, tensor in language.items():
        name = f"language_model.{name}"
        assert torch.equal(exported[name][: len(tensor)], tensor), name
        seen.add(name)
    for name in VOCABULARY_TABLES:
        assert exported[name].shape == (320, 32)
    rest = set(exported) - seen
    assert rest == {"image_newline"} | {
        f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }


def test_transformers_loads_every_tensor(run_directory: Path) -> None:
    _, info = AutoModelForImageTextToText.from_pretrained(
        run_directory / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"] and not info["error_msgs"]


def test_import_of_the_export_comes_back_the_same(run_directory: Path, tmp_path: Path) -> None:
    arguments = [*OVERRIDES, f"llava={run_directory / 'hf'}", f"out={tmp_path / 'import'}"]
    assert run(hf_import.main, arguments) == 0
    assert run(hf_export.main, [f"stage={tmp_path / 'import'}", f"out={tmp_path / 'hf'}"]) == 0
    first, second = read_weights(run_directory / "hf"), read_weights(tmp_path / "hf")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (run_directory / "hf" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize("names", ["legacy", "new"])
def test_transformers_loads_an_export_in_several_files(
    run_directory: Path, tmp_path: Path, names: str
) -> None:
    stage = run_directory / "import"
    request = hf_export.Request(stage, tmp_path / "hf", names=names, shard_bytes=60_000)
    hf_export.export(request)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    whole = AutoModelForImageTextToText.from_pretrained(run_directory / "hf").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.state_dict().items())


def test_the_file_is_the_librarys_own_bytes(run_directory: Path, tmp_path: Path) -> None:
    save_file(read_weights(run_directory / "hf"), tmp_path / "x", metadata={"format": "pt"})
    assert (tmp_path / "x").read_bytes() == (run_directory / "hf/model.safetensors").read_bytes()
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=run_directory / "hf")
    assert checked.returncode == 0


def test_killed_export_goes_on_after_its_last_whole_file(
    run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = run_directory / "import"
    request = hf_export.Request(stage, tmp_path / "hf", shard_bytes=60_000)
    written: list[str] = []
    original = export_weights._fill

    def dies_at_the_third(*arguments: Any) -> None:
        file = arguments[2]
        if len(written) == 2:
            (tmp_path / ".hf.partial" / file.name).write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file.name)
        original(*arguments)

    monkeypatch.setattr(export_weights, "_fill", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        hf_export.export(request)
    assert not request.out.exists() and len(written) == 2
    again: list[str] = []

    def counts(*arguments: Any) -> None:
        again.append(arguments[2].name)
        original(*arguments)

    monkeypatch.setattr(export_weights, "_fill", counts)
    hf_export.export(request)
    assert again and not set(again) & set(written)
    tensors = read_weights(request.out)
    whole = read_weights(run_directory / "hf")
    assert set(tensors) == set(whole)
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_too_large_for_float16_is_said(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_directory / "hf", tmp_path / "loud")
    tensors = read_weights(run_directory / "hf")
    tensors["image_newline"][3] = 1e5
    save_file(tensors, tmp_path / "loud/model.safetensors", metadata={"format": "pt"})
    arguments = [*OVERRIDES, f"llava={tmp_path / 'loud'}", f"out={tmp_path / 'import'}"]
    assert run(hf_import.main, arguments) == 0
    export = [f"stage={tmp_path / 'import'}", f"out={tmp_path / 'hf'}", "dtype=float16"]
    assert run(hf_export.main, export) == 1
    assert "image_newline holds 1e+05, beyond float16" in capsys.readouterr().err


def test_bf16_stays_bf16(run_directory: Path, tmp_path: Path) -> None:
    arguments = [*OVERRIDES, f"llava={run_directory / 'hf'}", "precision=bf16"]
    assert run(hf_import.main, [*arguments, f"out={tmp_path / 'import'}"]) == 0
    assert run(hf_export.main, [f"stage={tmp_path / 'import'}", f"out={tmp_path / 'hf'}"]) == 0
    first, second = read_weights(run_directory / "hf"), read_weights(tmp_path / "hf")
    assert all(torch.equal(first[name].bfloat16(), second[name]) for name in first)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_processor_counts_the_tokens_of_our_geometry(run_directory: Path) -> None:
    processor = AutoProcessor.from_pretrained(run_directory / "hf")
    model = compose(OVERRIDES).model
    geometry = AnyresGeometry.from_model(model)
    for width, height in ((50, 33), (200, 31), (20, 90)):
        content = [
            {"type": "image", "image": Image.open(io.BytesIO(picture(width, height)))},
            {"type": "text", "text": "Que algarismos?"},
        ]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert "token_type_ids" not in batch
        ids = batch["input_ids"][0]
        assert int((ids == model.image_token_id).sum()) == geometry.n_tokens(height, width)
        assert int((ids == 1).sum()) == 1, "one BOS"


def test_batches_answer_as_single_questions(run_directory: Path) -> None:
    model = ExportedModel(run_directory / "hf")
    questions = [
        Question(picture(w, h), f"Que algarismo é {w}?", "x", "read", "1x1")
        for w, h in ((50, 33), (200, 31), (20, 90))
    ]
    together = model.answers(questions, batch=3, max_new_tokens=6)
    alone = [model.answers([question], max_new_tokens=6)[0] for question in questions]
    assert together == alone
    pairs = [Pair(picture(60, 30), "Olá?", "um", "dois ou três", "style")]
    pairs.append(Pair(None, "Está?", "sete", "um", "style"))
    scores = model.log_probs(pairs)
    assert scores.shape == (2, 2)
    assert torch.allclose(model.log_probs(pairs[1:]), scores[1:], atol=1e-4)
    # by hand: prompt, answer and end token alone
    ids = model.processor.tokenizer(model.prompt("Está?", False))["input_ids"]
    answer = model.processor.tokenizer("sete<|im_end|>")["input_ids"]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids + answer])).logits[0].float()
    by_hand = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    assert scores[1, 0].item() == pytest.approx(by_hand.sum().item(), abs=1e-4)


def test_without_tiling_there_are_two_tiles(run_directory: Path) -> None:
    model = ExportedModel(run_directory / "hf").without_tiling()
    prompt = model.prompt("Olá?")
    batch = model.inputs([prompt], [picture(200, 31)], "left")
    assert batch["pixel_values"].shape[1] == 2
    assert model.answers(
        [Question(picture(200, 31), "Olá?", "", "", "")], max_new_tokens=2
    )  # model and processor agree on the number of features


def test_existing_output_and_unfinished_stage_are_refused(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(hf_export.main, [f"stage={run_directory / 'import'}", f"out={tmp_path}"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(hf_export.main, [f"stage={tmp_path}", f"out={tmp_path / 'hf'}"]) == 1
    assert "DONE.json is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip_a_bit,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 10),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.open("ab").write(b"more"),
    "missing": Path.unlink,
    "a link to nothing": link_to_nothing,
}


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_and_nothing_is_left(
    run_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
    pattern: str,
) -> None:
    stage = tmp_path / "import"
    shutil.copytree(run_directory / "import", stage)
    files = (stage / "checkpoints/step_00000000").glob(pattern)
    path = max(files, key=lambda p: p.stat().st_size)
    DAMAGE[damage](path)
    words = [f"stage={stage}", f"out={tmp_path / 'hf'}"]
    assert run(hf_export.main, words) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and path.name in said
    assert [path.name for path in tmp_path.iterdir()] == ["import"]


@pytest.mark.parametrize("template", [b"\xff\xfe", b"{% for %}", b"{{ x"])
def test_unreadable_template_is_refused_before_the_weights(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: bytes
) -> None:
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "import"
    shutil.copytree(run_directory / "backbones/tokenizer", tokenizer)
    (tokenizer / "chat_template.jinja").write_bytes(template)
    words = [f"llava={run_directory / 'hf'}", f"tokenizer={tokenizer}", f"out={out}"]
    assert run(hf_import.main, [*OVERRIDES, *words]) == 1
    assert "template" in capsys.readouterr().err
    assert not (out / "checkpoints").exists() and not (out / "DONE.json").exists()


def test_another_tokenizer_is_refused(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(run_directory / "import/tokenizer", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<image>\\n", "<image>"))
    arguments = [
        f"stage={run_directory / 'import'}",
        f"out={tmp_path / 'hf'}",
        f"tokenizer={other}",
    ]
    assert run(hf_export.main, arguments) == 1
    assert "not the tokenizer" in capsys.readouterr().err


def test_command_line_in_a_process_of_its_own(run_directory: Path, tmp_path: Path) -> None:
    """The checkpoint writer starts a process that imports the main module again."""
    backbones = run_directory / "backbones"
    command = [sys.executable, "-m", "tools.hf_import", *OVERRIDES]
    command += [f"{name}={backbones / name}" for name in ("vision", "language", "tokenizer")]
    command += [f"out={tmp_path / 'import'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "import/DONE.json").read_text())
    assert record["tokenizer_digest"] == read_done(run_directory / "import").tokenizer_digest
