"""Pre-training of the tiny SigLIP: which digit and which colour lies under every patch.

Supervised and dense, because a sigmoid image-text loss does not learn digits in the minutes at
hand. The labels are read off `hidden_states[feature_layer]`, the layer that the connector will
read; what comes after that layer stays as it was drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from conf.schema.model import ModelConfig
from models.anyres import AnyresGeometry
from tools.demo.canvases import COLOURS, Scene, draw_scene, render
from tools.demo.optimizers import Optimizers
from tools.demo.progress import Progress
from tools.demo.tiles import PADDING, cut_tiles, patch_labels

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

CHUNK = 256  # scenes drawn at a time, their tiles then shuffled


@dataclass(frozen=True)
class VisionRecipe:
    steps: int = 3000
    batch: int = 64  # tiles
    lr: float = 6e-3  # of matrices, by Muon
    table_lr: float = 6e-3  # of all else, by AdamW
    weight_decay: float = 0.05
    warmup: int = 100
    floor: float = 0.02
    colour_weight: float = 0.2
    single_until: float = 0.35  # share of the run in which pictures of one digit are more frequent


@dataclass(frozen=True)
class Tiles:
    """`pixels` uint8 [n, side, side, 3]; `labels` int64 [n, patches] as `patch_labels`;
    `colours` int64 [n], numbers in COLOURS."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    colours: NDArray[np.int64]


def tiles_of(scenes: list[Scene], geometry: AnyresGeometry) -> Tiles:
    """All tiles of the scenes, base tiles among them."""
    pixels = [cut_tiles(render(scene), geometry) for scene in scenes]
    labels = [patch_labels(scene, geometry).reshape(-1, geometry.grid**2) for scene in scenes]
    colours = [
        np.full(len(tiles), COLOURS.index(scene.colour))
        for scene, tiles in zip(scenes, pixels, strict=True)
    ]
    return Tiles(np.concatenate(pixels), np.concatenate(labels), np.concatenate(colours))


def batches(recipe: VisionRecipe, geometry: AnyresGeometry, seed: int) -> Iterator[Tiles]:
    """`recipe.steps` batches of tiles, single digits first more often than later."""
    rng = np.random.default_rng([seed, 11])
    step = 0
    while step < recipe.steps:
        single = max(0.0, 1 - step / max(1, recipe.single_until * recipe.steps))
        scenes = [
            draw_scene(rng, "train", (1, 1) if rng.random() < single else None)
            for _ in range(CHUNK)
        ]
        tiles = tiles_of(scenes, geometry)
        order = rng.permutation(len(tiles.pixels))
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            if step == recipe.steps:
                return
            rows = order[start : start + recipe.batch]
            yield Tiles(tiles.pixels[rows], tiles.labels[rows], tiles.colours[rows])
            step += 1


class DenseHeads(nn.Module):
    """Two linear readers of every patch, thrown away after pre-training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.digit = nn.Linear(hidden, PADDING + 1)
        self.colour = nn.Linear(hidden, len(COLOURS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[n, patches, hidden] -> logits [n, patches, 12] and [n, patches, 6]."""
        features = self.norm(features)
        return self.digit(features), self.colour(features)


def new_tower(model: ModelConfig) -> "SiglipVisionModel":
    """A SigLIP without pooling head, randomly drawn."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = model.vision
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            vision_use_head=False,
        )
    )


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, side, side, 3] -> float32 [n, 3, side, side] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def features(tower: "SiglipVisionModel", layers: int, pixels: Tensor) -> Tensor:
    """`hidden_states[feature_layer]`, [n, patches, hidden], without running the layers after."""
    inner = tower.vision_model
    hidden = inner.embeddings(pixels)
    for layer in inner.encoder.layers[:layers]:
        out = layer(hidden, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def pretrain_vision(
    model: ModelConfig, recipe: VisionRecipe, seed: int, every: int = 200
) -> tuple["SiglipVisionModel", dict[str, float]]:
    """Train a tower from nothing; returns it with its scores on dev scans."""
    torch.manual_seed(seed)
    geometry = AnyresGeometry.from_model(model)
    layers = model.vision.layers_used
    tower, heads = new_tower(model), DenseHeads(model.vision.hidden_size)
    named = [*tower.vision_model.embeddings.named_parameters(), *heads.named_parameters("heads")]
    named += tower.vision_model.encoder.layers[:layers].named_parameters()
    optimizers = Optimizers(
        named,
        ("position_embedding", "heads"),
        (recipe.lr, recipe.table_lr),
        recipe.weight_decay,
        recipe.steps,
        recipe.warmup,
        recipe.floor,
    )
    progress = Progress("vision", recipe.steps, every)
    for step, batch in enumerate(batches(recipe, geometry, seed), start=1):
        digit, colour = heads(features(tower, layers, normalise(batch.pixels)))
        labels = torch.from_numpy(batch.labels)
        loss = F.cross_entropy(digit.flatten(0, 1), labels.flatten())
        shown = labels != PADDING
        colours = torch.from_numpy(batch.colours)[:, None].expand_as(labels)
        loss = loss + recipe.colour_weight * F.cross_entropy(colour[shown], colours[shown])
        optimizers.step(loss)
        progress.update(step, loss.item())
    return tower.eval(), {**score(tower, heads, model, seed), "seconds": progress.seconds}


@torch.inference_mode()
def score(
    tower: "SiglipVisionModel", heads: DenseHeads, model: ModelConfig, seed: int, scenes: int = 300
) -> dict[str, float]:
    """Accuracy on dev scans: of patches that show a digit, of tiles by the sum of their patches'
    votes (tiles with a single digit), and of the background colour."""
    geometry = AnyresGeometry.from_model(model)
    rng = np.random.default_rng([seed, 12])
    tiles = tiles_of([draw_scene(rng, "dev") for _ in range(scenes)], geometry)
    labels = torch.from_numpy(tiles.labels)
    digit, colour = heads(features(tower, model.vision.layers_used, normalise(tiles.pixels)))
    is_digit = labels < 10
    one = [len(set(row[row < 10].tolist())) == 1 for row in labels]
    votes = (digit.log_softmax(-1)[..., :10] * is_digit[..., None]).sum(1).argmax(-1)
    truth = torch.where(is_digit, labels, -1).amax(1)
    single = torch.tensor(one)
    shown = labels != PADDING
    colours = torch.from_numpy(tiles.colours)[:, None].expand_as(labels)
    return {
        "patch_accuracy": _mean(digit.argmax(-1)[is_digit] == labels[is_digit]),
        "tile_accuracy": _mean(votes[single] == truth[single]),
        "colour_accuracy": _mean(colour.argmax(-1)[shown] == colours[shown]),
    }


def _mean(hits: Tensor) -> float:
    return float(hits.float().mean())
