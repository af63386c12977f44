"""The demo's backbones: a few steps of pre-training, saved, loaded, and not made twice."""

import json
import shutil

import numpy as np
import pytest
import torch

from conf.compose import compose
from data_shards.chat import ChatTokenizer
from models.anyres import NEWLINE, AnyresGeometry
from tools.command import run
from tools.demo.canvases import COLOURS, draw_scene
from tools.demo.language import DIGITS
from tools.demo.optimizers import Optimizers
from tools.demo.text_grids import (
    Noise,
    TurnTokens,
    WordTable,
    brief_words,
    clear_patches,
    draw_document,
    grid_words,
)
from tools.demo.tiles import NO_DIGIT, PADDING, patch_labels
from tools.demo.vision_pretraining import VisionRecipe, batches, features, new_tower, normalise
from tools.make_backbones import main, make_backbones, make_tokenizer

MODEL = compose(["model=tiny"]).model
GEOMETRY = AnyresGeometry.from_model(MODEL)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbones") / "tokenizer"
    make_tokenizer(path, MODEL)
    return path


@pytest.fixture(scope="module")
def table(tokenizer_dir):
    from tokenizers import Tokenizer

    return WordTable(Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")))


def test_text_grid_is_the_picture_in_anyres_order(tokenizer_dir, table):
    tokenizer = ChatTokenizer.from_directory(tokenizer_dir)
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene = draw_scene(rng, "train")
        words = grid_words(scene, GEOMETRY, table, Noise(), rng)
        assert len(words) == GEOMETRY.n_tokens(scene.height, scene.width)
        text = tokenizer.decode(words)
        labels = patch_labels(scene, GEOMETRY)
        order = GEOMETRY.feature_rows(scene.height, scene.width)
        names = "zero um dois três quatro cinco seis sete oito nove".split()
        names += [scene.colour, "nada"]
        spoken = [word for line in text.split("\n") for word in [*line.split(), "\n"]][:-1]
        expected = ["\n" if row == NEWLINE else names[labels[row]] for row in order]
        assert spoken == expected


def test_brief_words_are_the_cells(tokenizer_dir, table):
    tokenizer = ChatTokenizer.from_directory(tokenizer_dir)
    rng = np.random.default_rng(3)
    for _ in range(30):
        scene = draw_scene(rng, "train")
        lines = tokenizer.decode(brief_words(scene, table)).split("\n")
        assert lines.pop() == "" and len(lines) == scene.rows
        cells = [line.split() for line in lines]
        assert all(len(row) == 1 + scene.columns and row[0] == scene.colour for row in cells)
        for digit in scene.digits:
            assert cells[digit.row][1 + digit.column] == DIGITS[digit.value]
        assert sum(row.count(scene.colour) for row in cells) == (
            scene.rows * (1 + scene.columns) - len(scene.digits)
        )


def test_noise_changes_digits_only(table):
    rng = np.random.default_rng(1)
    changed = shown = 0
    for _ in range(60):
        scene = draw_scene(rng, "train")
        clean = grid_words(scene, GEOMETRY, table, Noise(), rng)
        noisy = grid_words(scene, GEOMETRY, table, Noise(0.2, 0.1, 0.2, 0.1), rng)
        digits = np.isin(clean, table.ids[:, :NO_DIGIT])
        assert (clean[~digits] == noisy[~digits]).all()
        changed += int((clean != noisy).sum())
        shown += int(digits.sum())
    assert 0.2 < changed / shown < 0.36  # 0.2 * 9/10 + 0.1


def test_noise_goes_by_how_clear_a_patch_is(table):
    rng = np.random.default_rng(2)
    for layout in ((1, 1), (1, 3)):
        scene = draw_scene(rng, "train", layout)
        while GEOMETRY.tile_grid(scene.height, scene.width) != layout:
            scene = draw_scene(rng, "train", layout)
        clear = clear_patches(scene, GEOMETRY)
        assert clear[16:].all() and clear[:16].all() == (layout == (1, 1))
        clean = grid_words(scene, GEOMETRY, table, Noise(), rng)
        noisy = grid_words(scene, GEOMETRY, table, Noise(unclear_missed=1.0), rng)
        assert (clean[16:] == noisy[16:]).all()
        assert (clean[:16] == noisy[:16]).all() == (layout == (1, 1))


def test_words_of_colours_and_padding(table):
    assert table.ids.shape == (len(COLOURS), PADDING + 1)
    assert len(set(table.ids[:, NO_DIGIT].tolist())) == len(COLOURS)
    assert len(set(table.ids[:, PADDING].tolist())) == 1


def test_documents_are_the_same_again_and_end_with_a_target(tokenizer_dir, table):
    tokens = TurnTokens(ChatTokenizer.from_directory(tokenizer_dir))

    def drawn():
        rng = np.random.default_rng(2)
        return [
            draw_document(rng, tokens, table, GEOMETRY, Noise(0.1, 0.1), 0.3, 3) for _ in range(40)
        ]

    for one, other in zip(drawn(), drawn(), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.targets[-1] and one.ids[-1] == 4 and not one.targets[0] and one.ids[0] == 1
        assert 768 not in one.ids


def test_features_are_the_hidden_states_of_transformers():
    torch.manual_seed(0)
    tower = new_tower(MODEL).eval()
    pixels = normalise(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8))
    with torch.inference_mode():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[MODEL.vision.feature_layer]
        ours = features(tower, MODEL.vision.layers_used, pixels)
    torch.testing.assert_close(ours, theirs)


def test_vision_batches_count_and_repeat():
    recipe = VisionRecipe(steps=7, batch=16)
    drawn = list(batches(recipe, GEOMETRY, 3))
    again = list(batches(recipe, GEOMETRY, 3))
    assert len(drawn) == 7
    for one, other in zip(drawn, again, strict=True):
        assert one.pixels.shape == (16, 32, 32, 3) and one.labels.shape == (16, 16)
        assert (one.pixels == other.pixels).all() and (one.labels == other.labels).all()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    seconds = make_backbones(out, ["model=tiny"], seed=0, speed=400)
    assert set(seconds) == {"vision", "language"}
    return out


def test_backbones_load_and_agree_with_the_model(backbones):
    from transformers import AutoTokenizer, LlamaForCausalLM, SiglipVisionModel

    tower = SiglipVisionModel.from_pretrained(backbones / "vision", local_files_only=True)
    assert not hasattr(tower.vision_model, "head")
    assert sum(p.numel() for p in tower.parameters()) == 368_800
    llama = LlamaForCausalLM.from_pretrained(backbones / "language", local_files_only=True)
    assert sum(p.numel() for p in llama.parameters()) == 902_272
    assert llama.config.vocab_size == 832 and llama.generation_config.eos_token_id == 4
    tokenizer = AutoTokenizer.from_pretrained(backbones / "tokenizer", local_files_only=True)
    assert tokenizer.eos_token_id == llama.config.eos_token_id
    record = json.loads((backbones / "language.DONE.json").read_text())
    assert 0 <= record["scores"]["exact_read"] <= 1


def test_finished_backbones_are_left_alone(backbones, capfd):
    before = (backbones / "vision" / "model.safetensors").stat().st_mtime_ns
    assert make_backbones(backbones, ["model=tiny"], seed=0, speed=400) == {}
    assert (backbones / "vision" / "model.safetensors").stat().st_mtime_ns == before
    assert capfd.readouterr().out.count("is up to date") == 2


def test_a_few_steps_learn_something():
    from dataclasses import replace

    from tools.demo.vision_pretraining import pretrain_vision

    recipe = replace(VisionRecipe(), steps=40, warmup=5)
    _, scores = pretrain_vision(MODEL, recipe, 0, every=1000)
    assert scores["colour_accuracy"] > 0.5  # chance is 1/6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed=0"], "speed=0 is not positive"),
        (["seed=x"], "seed= takes an integer"),
        (["part=ears"], "part=ears is neither vision nor language"),
        (["model=tiny", "model.image_token_id=5000"], "model.image_token_id"),
        (["colour=red"], "colour"),
    ],
)
def test_bad_arguments_are_one_line(words, message, tmp_path, capsys):
    assert run(main, [f"out={tmp_path}", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_failed_part_is_named_with_its_log_and_the_other_kept(backbones, tmp_path):
    out = tmp_path / "made"
    shutil.copytree(backbones, out)
    (out / "vision.DONE.json").unlink()
    (out / "vision.partial").write_text("a file where a directory must go")
    before = (out / "language" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"pre-training of vision failed .*vision\.log"):
        make_backbones(out, ["model=tiny"], seed=0, speed=400)
    assert (out / "language" / "model.safetensors").stat().st_mtime_ns == before


def test_optimizers_step_every_parameter_by_the_schedule():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3))
    optimizers = Optimizers(layer.named_parameters(), ("0.",), (1e-2, 1e-2), 0.0, 3, 1, 0.0)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        optimizers.step(layer(torch.arange(5)).pow(2).mean())
        moved = [not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
        assert all(moved)
