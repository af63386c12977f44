"""FLOPs against torch's counter on transformers' own models, and against published figures.

`FlopCounterMode` counts the products that run. Where it differs from `models.flops`, exactly:
eager causal attention computes all l * l pairs and masks half of them away; the rotary embedding
multiplies positions and frequencies as a matrix product; SigLIP's layers past `feature_layer` run
and are thrown away; logits of every token are computed. (Through CPU flash attention the counter
sees no attention at all, hence `eager`.) The first two are taken off here, the others avoided.
"""

import ast
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf.compose import compose
from conf.schema import ModelConfig
from models.flops import (
    MODULES,
    ModuleFlops,
    causal_pairs,
    decoder_pair_flops,
    forward_flops,
    training_flops,
)
from tests.models.tiny import Document, hf_logits, hf_twin, make_document, tiny_model

SUBSETS = [set(c) for n in range(4) for c in combinations(sorted(MODULES), n)]
PREFIX = {"vision": "vision_tower", "connector": "multi_modal_projector", "language": "language"}


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelConfig, Any, Document]:
    """A model whose vision layers all run, its eager transformers twin, two images and text."""
    model = tiny_model()
    model = replace(model, vision=replace(model.vision, layers=3, feature_layer=-1))
    twin = hf_twin(model)
    twin.set_attn_implementation("eager")
    return model, twin, make_document(model, [(33, 70), (90, 31)], 21, seed=1, multiple=1)


def ours(model: ModelConfig, document: Document, trained: set[str]) -> ModuleFlops:
    """As the counter would count: all l * l pairs, logits of every token."""
    length = len(document.tokens)
    tiles = sum(map(len, document.tiles))
    flops = training_flops(forward_flops(model, [length], length, tiles), trained)
    masked = flops.language_attention * (length**2 / causal_pairs([length]) - 1)
    return replace(flops, language=flops.language + masked)


def rotary(model: ModelConfig, length: int) -> int:
    """positions [l] times frequencies [head_dim / 2], once a forward pass."""
    return 2 * length * model.text.head_dim // 2


@pytest.mark.parametrize("trained", SUBSETS, ids=lambda names: "+".join(sorted(names)) or "none")
def test_training_flops_are_those_that_torch_counts(tiny: Any, trained: set[str]) -> None:
    model, twin, document = tiny
    twin.requires_grad_(False)
    for name, parameter in twin.named_parameters():
        owner = next((m for m, part in PREFIX.items() if part in name), None)
        if "lm_head" in name:
            owner = "language"
        elif "image_newline" in name:
            owner = "connector"
        assert owner is not None, name
        parameter.requires_grad_(owner in trained)
    with FlopCounterMode(display=False) as counter:
        logits = hf_logits(twin, document)
        if trained:
            logits.sum().backward()
    twin.zero_grad(set_to_none=True)
    expected = counter.get_total_flops() - rotary(model, len(document.tokens))
    assert ours(model, document, trained).total == expected


def test_each_module_is_what_torch_counts_in_it(tiny: Any) -> None:
    model, twin, document = tiny
    with FlopCounterMode(display=False, depth=9) as counter, torch.no_grad():
        hf_logits(twin, document)
    counted = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    top = type(twin).__name__
    flops = ours(model, document, set())
    assert flops.vision == counted[f"{top}.model.vision_tower"]
    assert flops.connector == counted[f"{top}.model.multi_modal_projector"]
    assert flops.vocabulary == counted[f"{top}.lm_head"]
    language = counted[f"{top}.model.language_model"]
    assert flops.language == language - rotary(model, len(document.tokens))


def test_layers_after_the_feature_layer_are_not_counted() -> None:
    model = tiny_model()  # four layers, the third one's output
    fewer = replace(model, vision=replace(model.vision, layers=3, feature_layer=-1))
    assert forward_flops(model, [], 0, 2) == forward_flops(fewer, [], 0, 2)


def test_targets_and_documents_count_alone() -> None:
    model = tiny_model()
    whole = forward_flops(model, [10, 6], 5, 0)
    apart = forward_flops(model, [10], 5, 0) + forward_flops(model, [6], 0, 0)
    joined = forward_flops(model, [16], 5, 0)
    assert whole == apart
    assert whole.vocabulary == joined.vocabulary == 2 * 5 * 64 * 96
    crossing = 10 * 6  # pairs between the two documents
    assert joined.language - whole.language == crossing * decoder_pair_flops(model.text)


def test_unknown_module() -> None:
    with pytest.raises(ValueError, match="cannot train head; known: connector, language, vision"):
        training_flops(ModuleFlops(language=1.0), {"head"})


def megatron_training_flops(model: ModelConfig, length: int) -> float:
    """`num_floating_point_operations` of Megatron-LM (megatron/training/training.py, dense
    transformer), one sequence: the formula behind its TFLOP/s. (Older releases count both
    halves of the attention matrix.)"""
    text = model.text
    query_to_hidden = text.heads * text.head_dim / text.hidden_size
    return (
        12 * length * text.layers * text.hidden_size**2
        * (
            (1 + text.kv_heads / text.heads + length / text.hidden_size / 2) * query_to_hidden
            + text.intermediate_size / text.hidden_size * 1.5  # gated
        )
        + 6 * length * text.hidden_size * text.vocab_size
    )  # fmt: skip


@pytest.mark.parametrize("length", [4096, 16384])
def test_language_model_beside_megatrons_formula(length: int) -> None:
    """Megatron takes half of all pairs, we l + 1 over 2: half a diagonal more."""
    model = compose(["model=amalia_vl_9b"]).model
    flops = training_flops(forward_flops(model, [length], length, 0), MODULES)
    diagonal = 3 * decoder_pair_flops(model.text) * length / 2
    assert flops.total == pytest.approx(megatron_training_flops(model, length) + diagonal, rel=1e-9)
    assert diagonal / flops.total < 1e-4


@pytest.mark.parametrize(("side", "published"), [(224, 220.35e9), (384, 670.35e9)])
def test_siglip_so400m_is_what_open_clip_publishes(side: int, published: float) -> None:
    """docs/model_profile.csv of mlfoundations/open_clip, ViT-SO400M-14-SigLIP(-384), column
    image_gflops; theirs ends in a pooling head that LLaVA does not use."""
    model = compose(["model=amalia_vl_9b_patch14", "model.vision.feature_layer=-1"]).model
    vision = replace(model.vision, image_size=side)
    tile = forward_flops(replace(model, vision=vision), [], 0, 1).vision
    patches, hidden = (side // 14) ** 2, 1152
    keys_and_values = 4 * patches * hidden**2
    probe = 4 * patches * hidden + 4 * hidden**2 + 4 * hidden * vision.intermediate_size
    assert tile + keys_and_values + probe == pytest.approx(published, abs=0.01e9)


def test_importing_it_imports_no_torch() -> None:
    """The planner starts in under two seconds."""
    source = Path("models/flops.py").read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {"__future__", "collections", "dataclasses", "conf"}
    program = "import models.flops, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
