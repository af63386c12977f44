"""Floating-point operations of a batch: what the model needs, not what the machine did.

Counted: matrix products and attention, a multiply-add as two; real tokens and tiles only. Not
counted: padding, recomputed activations and logits (flash attention's scores included), norms,
activation functions, softmax, rotary embedding, embedding look-up, optimizer. Hence "model FLOPs"
in the sense of PaLM (Chowdhery et al. 2022, appendix B), with two differences: causal attention
counts the pairs that it looks at, l * (l + 1) / 2 in a document of l tokens, and a gradient is
counted only where some weight needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

from conf.schema import ModelConfig, TextConfig, VisionConfig

MODULES = frozenset({"vision", "connector", "language"})


@dataclass(frozen=True)
class ModuleFlops:
    """FLOPs by module, and of them those whose gradients cost another multiple than the rest."""

    language: float = 0.0  # decoder layers
    vocabulary: float = 0.0  # the projection to logits
    vision: float = 0.0
    connector: float = 0.0
    # Parts of the four above.
    language_attention: float = 0.0  # scores and weighted sums: no weights of their own
    patch_embedding: float = 0.0  # of vision; its input, pixels, needs no gradient
    connector_first: float = 0.0  # of connector; its input needs one where the tower trains

    @property
    def total(self) -> float:
        """FLOPs of the whole model."""
        return self.language + self.vocabulary + self.vision + self.connector

    def __add__(self, other: ModuleFlops) -> ModuleFlops:
        return ModuleFlops(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def causal_pairs(documents: Iterable[int]) -> int:
    """(query, key) pairs that causal attention looks at, documents of these many tokens."""
    return sum(length * (length + 1) // 2 for length in documents)


def decoder_token_flops(text: TextConfig) -> float:
    """Forward FLOPs of the weights of all decoder layers for one token."""
    heads_width = text.heads * text.head_dim
    projections = text.hidden_size * (2 * heads_width + 2 * text.kv_heads * text.head_dim)
    mlp = 3 * text.hidden_size * text.intermediate_size  # SwiGLU: gate, up, down
    return 2.0 * text.layers * (projections + mlp)


def decoder_pair_flops(text: TextConfig) -> float:
    """Forward FLOPs of all layers' attention for one pair: a score and its weighted sum."""
    return 4.0 * text.layers * text.heads * text.head_dim


def patch_embedding_flops(vision: VisionConfig) -> float:
    """Forward FLOPs of the patch embedding for one tile."""
    return 2.0 * vision.grid**2 * 3 * vision.patch_size**2 * vision.hidden_size


def encoder_flops(vision: VisionConfig) -> float:
    """Forward FLOPs of the encoder layers that run, for one tile; all patches see each other."""
    patches, hidden = vision.grid**2, vision.hidden_size
    weights = 4 * hidden * hidden + 2 * hidden * vision.intermediate_size
    return vision.layers_used * (2.0 * patches * weights + 4.0 * patches * patches * hidden)


def forward_flops(
    model: ModelConfig, documents: Iterable[int], targets: int, tiles: int
) -> ModuleFlops:
    """One forward pass over a batch.

    Args:
        documents: tokens of each document, padding excluded.
        targets: tokens with a loss; only their rows of logits are computed.
        tiles: tiles that stand for images (not the black tile of a text-only batch). The two sides
            of a preference pair share theirs.
    """
    lengths = list(documents)
    return batch_flops(model, sum(lengths), causal_pairs(lengths), targets, tiles)


def batch_flops(
    model: ModelConfig, tokens: int, attended: int, targets: int, tiles: int
) -> ModuleFlops:
    """`forward_flops` of documents that hold `tokens` tokens and `attended` causal pairs."""
    text, vision = model.text, model.vision
    attention = attended * decoder_pair_flops(text)
    patches = tiles * patch_embedding_flops(vision)
    rows = tiles * vision.grid**2
    first = 2.0 * rows * vision.hidden_size * text.hidden_size
    return ModuleFlops(
        language=tokens * decoder_token_flops(text) + attention,
        vocabulary=2.0 * targets * text.hidden_size * text.vocab_size,
        vision=patches + tiles * encoder_flops(vision),
        connector=first + 2.0 * rows * text.hidden_size**2,
        language_attention=attention,
        patch_embedding=patches,
        connector_first=first,
    )


def training_flops(forward: ModuleFlops, trained: Collection[str]) -> ModuleFlops:
    """Forward and backward pass, exactly, where only the modules `trained` learn.

    A product of activations and weights costs as much again for the gradient of its weights, if
    they train, and as much again for that of its input, if anything before it trains. Attention
    has two inputs to each product and no weights: 3 times wherever gradients pass at all.

    | | trains | passes gradients on | neither |
    |---|---|---|---|
    | patch embedding | 2 | - | 1 |
    | encoder | 3 | - | 1 |
    | connector, first layer | 3, or 2 with a frozen tower | 2 | 1 |
    | connector, second layer | 3 | 2 | 1 |
    | decoder and vocabulary: weights | 3 | 2 | 1 |
    | decoder: attention | 3 | 3 | 1 |

    Raises:
        ValueError: a name other than vision, connector, language.
    """
    unknown = sorted(set(trained) - MODULES)
    if unknown:
        raise ValueError(f"cannot train {', '.join(unknown)}; known: {', '.join(sorted(MODULES))}")
    tower, connector, language = (name in trained for name in ("vision", "connector", "language"))
    before = tower or connector  # what the decoder reads depends on weights that train
    first = (1 + connector + tower) * forward.connector_first
    # The gradient of what the first layer puts out serves it, or the tower before it.
    second = (1 + connector + before) * (forward.connector - forward.connector_first)
    patches = (1 + tower) * forward.patch_embedding
    encoder = (1 + 2 * tower) * (forward.vision - forward.patch_embedding)
    # The token embedding trains with the decoder, so its first layer's input needs a gradient.
    weights = 1 + language + (language or before)
    attention = (1 + 2 * (language or before)) * forward.language_attention
    return ModuleFlops(
        language=weights * (forward.language - forward.language_attention) + attention,
        vocabulary=weights * forward.vocabulary,
        vision=patches + encoder,
        connector=first + second,
        language_attention=attention,
        patch_embedding=patches,
        connector_first=first,
    )
