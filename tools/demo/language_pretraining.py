"""Pre-training of the tiny Llama: chats about pictures told in words, and chats without any.

What it learns here is the language, the anyres order, and the table of sums; no pixel is seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from conf.schema.model import ModelConfig
from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry
from tools.demo import language
from tools.demo.language import answer
from tools.demo.optimizers import Optimizers
from tools.demo.progress import Progress
from tools.demo.questions import draw_questions, scene_for_questions
from tools.demo.text_grids import (
    Document,
    Noise,
    TurnTokens,
    WordTable,
    draw_document,
    grid_words,
    length_buckets,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class LanguageRecipe:
    steps: int = 1000
    batch: int = 16  # documents
    lr: float = 3e-3  # of matrices, by Muon
    table_lr: float = 1e-2  # of the embedding table, the head and the norms, by AdamW
    weight_decay: float = 0.01
    warmup: int = 50
    floor: float = 0.02
    text_share: float = 0.18
    turns: int = 4
    brief_until: float = 0.5  # share of the run in which some pictures are told in brief
    # See `tools.demo.text_grids.Noise`; the shares are about what the tower then does.
    noise: Noise = field(default_factory=lambda: Noise(0.03, 0.04, 0.3, 0.08))
    noise_from: float = 0.4  # share of the run after which the words begin to lie


def new_language_model(model: ModelConfig) -> "LlamaForCausalLM":
    """A Llama, randomly drawn; token ids as in `tools.demo.tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = model.text
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads,
            head_dim=text.head_dim,
            max_position_embeddings=text.max_positions,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=4,
            pad_token_id=2,
        )
    )


def collate(documents: list[Document], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, targets): int64 and bool [n, longest]; padding on the right is never a target."""
    longest = max(len(document.ids) for document in documents)
    ids = np.full((len(documents), longest), pad, np.int64)
    targets = np.zeros((len(documents), longest), bool)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = document.ids
        targets[row, : len(document.ids)] = document.targets
    return torch.from_numpy(ids), torch.from_numpy(targets)


def loss_of(model: "LlamaForCausalLM", ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the target tokens; the head runs on the places before them only."""
    # No attention mask: padding is on the right, out of a causal decoder's sight.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = targets[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


def pretrain_language(
    model: ModelConfig, tokenizer_dir: Path, recipe: LanguageRecipe, seed: int, every: int = 100
) -> tuple["LlamaForCausalLM", dict[str, float]]:
    """Train a decoder from nothing; returns it with its scores on dev text grids."""
    torch.manual_seed(seed)
    llama = new_language_model(model).train()
    tokenizer = ChatTokenizer.from_directory(tokenizer_dir)
    tokens = TurnTokens(tokenizer)
    table = WordTable(Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")))
    geometry = AnyresGeometry.from_model(model)
    rng = np.random.default_rng([seed, 21])
    done = 0

    def documents() -> Iterator[Document]:
        while True:
            noise = recipe.noise if done >= recipe.noise_from * recipe.steps else Noise()
            brief = max(0.0, 1 - done / max(1, recipe.brief_until * recipe.steps))
            turns = int(rng.integers(1, recipe.turns + 1))
            yield draw_document(
                rng, tokens, table, geometry, noise, recipe.text_share, turns, brief
            )

    optimizers = Optimizers(
        llama.named_parameters(),
        ("embed_tokens", "lm_head"),
        (recipe.lr, recipe.table_lr),
        recipe.weight_decay,
        recipe.steps,
        recipe.warmup,
        recipe.floor,
    )
    batches = length_buckets(documents(), recipe.batch, 8, rng)
    progress = Progress("language", recipe.steps, every)
    for done in range(recipe.steps):
        loss = loss_of(llama, *collate(next(batches), tokenizer.pad_id))
        optimizers.step(loss)
        progress.update(done + 1, loss.item())
    llama.eval()
    return llama, {**score(llama, tokens, table, geometry, seed), "seconds": progress.seconds}


@torch.inference_mode()
def score(
    llama: "LlamaForCausalLM",
    tokens: TurnTokens,
    table: WordTable,
    geometry: AnyresGeometry,
    seed: int,
    scenes: int = 200,
) -> dict[str, float]:
    """Share of questions on noiseless text grids of dev scenes whose whole answer is the likeliest
    at every token (equal to greedy decoding being right), by kind."""
    rng = np.random.default_rng([seed, 22])
    asked: list[tuple[str, Document]] = []
    for _ in range(scenes):
        scene = scene_for_questions(rng, "dev")
        for kind, wording in draw_questions(rng, scene, 2):
            words = grid_words(scene, geometry, table, Noise(), rng)
            turns = [(wording.question, answer(wording, scene))]
            asked.append((kind, tokens.document(turns, words)))
    asked.sort(key=lambda pair: len(pair[1].ids))
    hits: dict[str, list[bool]] = {kind: [] for kind in language.KINDS}
    for start in range(0, len(asked), 50):
        batch = asked[start : start + 50]
        ids, targets = collate([document for _, document in batch], tokens.tokenizer.pad_id)
        right = llama(ids, use_cache=False).logits[:, :-1].argmax(-1) == ids[:, 1:]
        whole = (right | ~targets[:, 1:]).all(1)
        for (kind, _), hit in zip(batch, whole.tolist(), strict=True):
            hits[kind].append(hit)
    return {f"exact_{kind}": float(np.mean(found)) for kind, found in hits.items() if found}
