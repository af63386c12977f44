"""Names, shapes and exact round trips of the state-dict adapter."""

import json
from pathlib import Path

import pytest
import torch

from conf.schema import ModelConfig, TextConfig, VisionConfig
from models.hf_state import (
    from_hf,
    match_text,
    match_vision,
    shapes_of,
    table,
    text_table,
    to_hf,
    vision_table,
)

KEYS_9B = Path(__file__).with_name("hf_keys_9b.txt")


def model_9b() -> ModelConfig:
    return ModelConfig(
        name="amalia_vl_9b",
        vision=VisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            layers=27,
            heads=16,
            image_size=384,
            patch_size=16,
        ),
        text=TextConfig(
            hidden_size=4096,
            intermediate_size=12288,
            layers=42,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab_size=128064,
            max_positions=32768,
        ),
        image_token_id=128000,
    )


def small() -> ModelConfig:
    return ModelConfig(
        name="small",
        vision=VisionConfig(
            hidden_size=8, intermediate_size=12, layers=4, heads=2, image_size=8, patch_size=4
        ),
        text=TextConfig(
            hidden_size=16,
            intermediate_size=20,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=6,  # not hidden_size / heads, on purpose
            vocab_size=32,
            max_positions=64,
        ),
        image_token_id=31,
    )


def random_hf(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for entry in table(model)
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }


def in_memory(name: str) -> str:
    """The names of `LlavaNextForConditionalGeneration.state_dict()` in 4.57.6."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def test_real_names_and_shapes() -> None:
    expected = {}
    for line in KEYS_9B.read_text().splitlines():
        if not line.startswith("#"):
            name, shape = line.split("\t")
            expected[name] = torch.empty(json.loads(shape), device="meta")
    ours = from_hf(expected, model_9b())
    back = to_hf(ours, model_9b())
    assert len(back) == 823
    assert {k: list(v.shape) for k, v in back.items()} == {
        k: list(v.shape) for k, v in expected.items()
    }
    assert ours["language_model.decoder.layers.0.self_attention.linear_qkv.weight"].shape == (
        (32 + 2 * 8) * 128,
        4096,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_exact(dtype: torch.dtype) -> None:
    hf = random_hf(small(), dtype)
    ours = from_hf(hf, small())
    back = to_hf(ours, small())
    assert set(back) == set(hf)
    assert all(torch.equal(back[name], hf[name]) and back[name].dtype == dtype for name in hf)
    again = from_hf(back, small())
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_qkv_rows_per_query_group() -> None:
    hf = random_hf(small())
    q, k, v = (hf[f"language_model.model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    layer = "language_model.decoder.layers.1."
    packed = from_hf(hf, small())[f"{layer}self_attention.linear_qkv.weight"]
    # two query groups of two heads of width 6: q0 q1 k0 v0 | q2 q3 k1 v1
    assert torch.equal(packed, torch.cat([q[:12], k[:6], v[:6], q[12:], k[6:], v[6:]]))


def test_gate_before_up() -> None:
    hf = random_hf(small())
    joined = from_hf(hf, small())["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(joined[:20], hf["language_model.model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(joined[20:], hf["language_model.model.layers.0.mlp.up_proj.weight"])


def test_other_spellings_of_hf_names() -> None:
    hf = random_hf(small())
    ours = from_hf(hf, small())
    four = {in_memory(name): tensor for name, tensor in hf.items()}
    nested, flat = "vision_tower.vision_model.", "vision_tower."
    five = {name.replace(nested, flat): tensor for name, tensor in four.items()}
    for spelling in (four, five):
        assert set(spelling) != set(hf)
        got = from_hf(spelling, small())
        assert all(torch.equal(got[name], ours[name]) for name in ours)


def test_fused_norm_names_both_ways() -> None:
    hf = random_hf(small())
    fused = from_hf(hf, small(), fused_norms=True)
    assert "vision_tower.encoder.layers.0.mlp.linear_fc1.layer_norm_bias" in fused
    assert not any("input_layernorm" in name for name in fused)
    back = to_hf({**fused, "language_model.decoder._extra_state": torch.zeros(1)}, small())
    assert all(torch.equal(back[name], hf[name]) for name in hf)


def test_backbones_give_the_same_as_the_whole() -> None:
    hf = random_hf(small())
    whole = from_hf(hf, small())
    vision = {
        name.removeprefix("vision_tower."): hf[name]
        for entry in vision_table(small())
        for name in entry.hf
    }
    vision["vision_model.head.probe"] = torch.zeros(1, 1, 8)
    text = {
        name.removeprefix("language_model."): hf[name]
        for entry in text_table(small())
        for name in entry.hf
    }
    parts = {
        found.entry.megatron: found.entry.join([state[name] for name in found.theirs])
        for match, state in ((match_vision, vision), (match_text, text))
        for found in match(shapes_of(state), small())
    }
    assert set(whole) - set(parts) == {n for n in whole if n.startswith(("connector", "image_"))}
    assert all(torch.equal(parts[name], whole[name]) for name in parts)
    siglip = {**vision, "text_model.embeddings.x": torch.zeros(2), "logit_scale": torch.zeros(1)}
    assert match_vision(shapes_of(siglip), small()) == match_vision(shapes_of(vision), small())


def test_vocabulary_grows_by_the_mean_row() -> None:
    hf = random_hf(small())
    name = "language_model.model.embed_tokens.weight"
    short = hf[name][:29]
    grown = from_hf({**hf, name: short}, small())["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(grown[:29], short)
    assert torch.equal(grown[29:], short.double().mean(0, keepdim=True).float().expand(3, -1))
    with pytest.raises(ValueError, match="model.text.vocab_size=40"):
        from_hf({**hf, name: torch.zeros(40, 16)}, small())


def test_what_is_wrong_is_named() -> None:
    hf = random_hf(small())
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \[16, 21\].*expects \[16, 20\]"):
        from_hf({**hf, name: torch.zeros(16, 21)}, small())
    with pytest.raises(ValueError, match=f"{name} is missing"):
        from_hf({k: v for k, v in hf.items() if k != name}, small())
    extra = name.replace("layers.1.", "layers.2.")
    with pytest.raises(ValueError, match=f"unexpected Hugging Face tensor {extra}"):
        from_hf({**hf, extra: hf[name]}, small())
    with pytest.raises(ValueError, match="twice"):
        from_hf({**hf, "lm_head.weight": hf["language_model.lm_head.weight"]}, small())
    ours = from_hf(hf, small())
    with pytest.raises(ValueError, match="image_newline is missing"):
        to_hf({k: v for k, v in ours.items() if k != "image_newline"}, small())
