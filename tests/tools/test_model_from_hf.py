"""A model's configuration from checkpoints that transformers saved; import with nothing else."""

from pathlib import Path

import pytest
import yaml

from conf.compose import compose
from tests.tools.small_backbones import write_tokenizer
from tests.tools.weights import read_weights
from tools import hf_import, model_from_hf
from tools.command import run


def flat(values: dict, prefix: str = "model") -> list[str]:
    """Nested values as Hydra overrides."""
    words = []
    for key, value in values.items():
        name = f"{prefix}.{key}"
        words += flat(value, name) if isinstance(value, dict) else [f"{name}={value}"]
    return words


def test_backbones_with_tied_scaled_llama(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=300,
            max_position_embeddings=512,
            rope_theta=123456.0,
            rope_scaling=scaling,
            tie_word_embeddings=True,
        )
    ).save_pretrained(tmp_path / "language")
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(tmp_path / "vision")
    write_tokenizer(tmp_path / "tokenizer", with_image=False)
    paths = [f"{name}={tmp_path / name}" for name in ("vision", "language", "tokenizer")]
    assert run(model_from_hf.main, ["name=small", *paths]) == 0
    written = capsys.readouterr().out
    model = yaml.safe_load(written)
    assert "vision.feature_layer, connector.bias, max_tiles" in written
    assert model["text"]["rope_theta"] == 123456.0
    assert model["text"]["rope_scaling"]["kind"] == "llama3"
    assert (model["image_token_id"], model["text"]["vocab_size"]) == (300, 320)
    words = ["model=tiny", *flat(model)]
    assert compose(words).model.text.head_dim == 8
    assert run(hf_import.main, [*words, *paths, f"out={tmp_path / 'import'}"]) == 0
    # Tied: the output layer begins with the embedding's rows.
    from tools import hf_export

    assert run(hf_export.main, [f"stage={tmp_path / 'import'}", f"out={tmp_path / 'hf'}"]) == 0
    tensors = read_weights(tmp_path / "hf")
    head, embedding = (
        tensors[f"language_model.{name}.weight"] for name in ("lm_head", "model.embed_tokens")
    )
    assert head.equal(embedding)
    assert embedding[:300].equal(read_weights(tmp_path / "language")["model.embed_tokens.weight"])
    # And the export describes itself.
    capsys.readouterr()
    assert run(model_from_hf.main, ["name=again", f"llava={tmp_path / 'hf'}"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    assert {**again, "name": "small"} == model
