"""A tiny network, its transformers twin, and packed rows to feed both with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import ModelConfig, TextConfig, VisionConfig
from models.anyres import NEWLINE, AnyresGeometry
from models.hf_state import from_hf
from models.vision_tower import pixel_table
from tools.hf_config import stated_scaling


def tiny_model(layers: int = 4, heads: int = 4, kv_heads: int = 2) -> ModelConfig:
    """Four vision layers (three used), decoder layers with grouped queries, odd widths."""
    return ModelConfig(
        name="tiny-test",
        vision=VisionConfig(32, 48, 4, 4, image_size=32, patch_size=8),
        text=TextConfig(
            hidden_size=64,
            intermediate_size=112,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=24,
            vocab_size=96,
            max_positions=512,
            rope_theta=5e5,
        ),
        image_token_id=95,
        max_tiles=4,
    )


def hf_twin(model: ModelConfig, seed: int = 0) -> Any:
    """`LlavaNextForConditionalGeneration` of the same shape with random weights, float32."""
    from transformers import (
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision, text = model.vision, model.text
    config = LlavaNextConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_positions,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta,
            rope_scaling=stated_scaling(text.rope_scaling),
            tie_word_embeddings=False,
        ),
        image_token_index=model.image_token_id,
        projector_hidden_act="gelu",
        multimodal_projector_bias=model.connector.bias,
        vision_feature_select_strategy="full",
        vision_feature_layer=vision.feature_layer,
        image_grid_pinpoints=[list(pair) for pair in AnyresGeometry.from_model(model).pinpoints],
        tie_word_embeddings=False,
    )
    twin = LlavaNextForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, scale, generator=draw)
            if "norm" in name and name.endswith("weight"):
                parameter += 1.0
    return twin


def megatron_state(twin: torch.nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """The twin's weights under Megatron names, unsharded."""
    return from_hf(twin.state_dict(), model)


@dataclass(frozen=True)
class Document:
    """One sample: tokens with image placeholders expanded, targets, images."""

    tokens: np.ndarray  # int64 [L]
    target: np.ndarray  # bool [L]: the token is an answer's
    sizes: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)  # uint8 [n, 3, side, side] per image


def make_document(
    model: ModelConfig, sizes: Sequence[tuple[int, int]], text: int, seed: int, multiple: int = 4
) -> Document:
    """Random text around images of the given sizes, padded to a multiple of `multiple`."""
    draw = np.random.default_rng(seed)
    geometry = AnyresGeometry.from_model(model)
    words = np.array_split(draw.integers(1, model.image_token_id, text), len(sizes) + 1)
    parts = [words[0]]
    for size, following in zip(sizes, words[1:], strict=True):
        parts += [np.full(geometry.n_tokens(*size), model.image_token_id), following]
    tokens = np.concatenate(parts).astype(np.int64)
    target = (tokens != model.image_token_id) & (draw.random(len(tokens)) < 0.7)
    pad = -len(tokens) % multiple
    side = model.vision.image_size
    return Document(
        tokens=np.concatenate([tokens, np.zeros(pad, np.int64)]),
        target=np.concatenate([target, np.zeros(pad, bool)]),
        sizes=list(sizes),
        tiles=[
            draw.integers(0, 256, (geometry.n_tiles(*size), 3, side, side), dtype=np.uint8)
            for size in sizes
        ],
    )


def documents(model: ModelConfig) -> list[Document]:
    """Odd sizes, several images, text only, one image alone."""
    return [
        make_document(model, [(33, 70), (90, 31)], 21, seed=1),
        make_document(model, [], 30, seed=2),
        make_document(model, [(32, 32)], 9, seed=3),
        make_document(model, [(5, 200)], 14, seed=4),
        make_document(model, [], 7, seed=5),
        make_document(model, [(61, 64)], 40, seed=6),
        make_document(model, [], 64, seed=7),
        make_document(model, [(7, 9), (40, 20)], 12, seed=8),
    ]


def micro_batch(model: ModelConfig, packs: Sequence[Sequence[Document]], length: int) -> dict:
    """Packs of `length` tokens laid end to end: `LlavaNext.forward`'s arguments and a loss mask.

    Each pack's rest is one padding document, so that a pack has `length` tokens exactly.
    """
    geometry = AnyresGeometry.from_model(model)
    side, per_tile = model.vision.image_size, geometry.grid**2
    tokens, labels, mask, positions, ends = [], [], [], [], [0]
    image_positions, image_rows = [], []
    tiles: list[np.ndarray] = []
    for pack in packs:
        start = ends[-1]
        for document in pack:
            count = len(document.tokens)
            places = np.flatnonzero(document.tokens == model.image_token_id) + ends[-1]
            rows = []
            for size, image in zip(document.sizes, document.tiles, strict=True):
                first = per_tile * sum(map(len, tiles))
                index = geometry.feature_rows(*size)
                rows.append(np.where(index == NEWLINE, NEWLINE, index + first))
                tiles.append(image)
            if rows:
                image_positions.append(places)
                image_rows.append(np.concatenate(rows))
            is_target = np.append(document.target[1:], False)
            tokens.append(document.tokens)
            labels.append(np.where(is_target, np.append(document.tokens[1:], 0), 0))
            mask.append(is_target.astype(np.float32))
            positions.append(np.arange(count))
            ends.append(ends[-1] + count)
        rest = start + length - ends[-1]
        assert rest >= 0, "the documents do not fit into the pack"
        if rest:
            tokens.append(np.zeros(rest, np.int64))
            labels.append(np.zeros(rest, np.int64))
            mask.append(np.zeros(rest, np.float32))
            positions.append(np.arange(rest))
            ends.append(ends[-1] + rest)
    if not tiles:
        tiles.append(np.zeros((1, 3, side, side), np.uint8))
    all_tiles = np.concatenate(tiles)
    newline = len(all_tiles) * per_tile
    rows_P = np.concatenate([*image_rows, np.zeros(0, np.int64)]).astype(np.int64)
    arrays = {
        "tokens_T": np.concatenate(tokens),
        "labels_T": np.concatenate(labels).astype(np.int64),
        "loss_mask_T": np.concatenate(mask),
        "position_ids_T": np.concatenate(positions).astype(np.int64),
        "cu_seqlens": np.asarray(ends, np.int32),
        "tiles_NCHW": all_tiles,
        "image_positions_P": np.concatenate([*image_positions, np.zeros(0, np.int64)]).astype(
            np.int64
        ),
        "image_rows_P": np.where(rows_P == NEWLINE, newline, rows_P),
    }
    batch: dict = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch["max_seqlen"] = int(np.diff(arrays["cu_seqlens"]).max())
    return batch


def hf_logits(twin: torch.nn.Module, document: Document) -> Tensor:
    """The document run alone through transformers, float32 [L, V]."""
    inputs: dict = {"input_ids": torch.from_numpy(document.tokens)[None]}
    if document.tiles:
        table = pixel_table()
        most = max(len(image) for image in document.tiles)
        pixels = torch.zeros(len(document.tiles), most, *document.tiles[0].shape[1:])
        for number, image in enumerate(document.tiles):
            pixels[number, : len(image)] = table[torch.from_numpy(image).long()]
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(document.sizes)}
    return twin(**inputs).logits[0]


def hf_loss(twin: torch.nn.Module, batch: Sequence[Document]) -> Tensor:
    """Mean negative log-likelihood of all documents' target tokens."""
    total, count = torch.zeros(()), 0
    for document in batch:
        keep = torch.from_numpy(document.target[1:])
        wanted = torch.from_numpy(document.tokens[1:])[keep]
        logits = hf_logits(twin, document)[:-1][keep]
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        count += len(wanted)
    return total / count


def hf_gradients(twin: torch.nn.Module, model: ModelConfig) -> Mapping[str, Tensor]:
    """The twin's gradients under Megatron names; zero where transformers computes none."""
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in twin.named_parameters()
    }
    return from_hf(gradients, model)
