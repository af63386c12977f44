"""What both sides are asked: chats and pictures that exercise every path, always the same."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from models.anyres import AnyresGeometry


@dataclass(frozen=True)
class Case:
    """One conversation up to the answer: pictures (PNG bytes), then a text, in one user turn."""

    name: str
    pictures: tuple[bytes, ...]
    text: str


def picture(seed: int, width: int, height: int) -> bytes:
    """A PNG of smooth colours and noise: no two tiles of it are alike."""
    draw = np.random.default_rng([seed, width, height])
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    channels = [
        127 + 100 * np.sin(2 * np.pi * (a * x + b * y + c))
        for a, b, c in draw.uniform(0, 3, (3, 3))
    ]
    noise = draw.integers(-24, 25, (height, width, 3))
    pixels = np.clip(np.stack(channels, axis=-1) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cases(geometry: AnyresGeometry) -> list[Case]:
    """Wide, tall, odd, several pictures, none; sizes follow the tile."""
    side = geometry.tile
    wide, tall = (2 * side - 3, side // 2 + 5), (side // 2 + 1, 2 * side + 7)
    return [
        Case("wide", (picture(1, *wide),), "O que se vê na imagem?"),
        Case("tall", (picture(2, *tall),), "Descreve a fotografia em duas frases."),
        Case("small", (picture(3, side // 2, side // 2),), "Que cores há?"),
        Case(
            "two pictures",
            (picture(4, *tall), picture(5, *wide)),
            "Em que diferem as duas imagens? Responde só com uma palavra.",
        ),
        Case("text only", (), "Olá! Como se diz «screen» em português europeu?"),
    ]


def image_sizes(geometry: AnyresGeometry, more: int = 40) -> list[tuple[int, int]]:
    """(height, width): each canvas exactly, one pixel off it, and odd sizes of many shapes."""
    sizes = []
    for height, width in geometry.pinpoints:
        sizes += [(height, width), (height - 1, width), (height, width + 1)]
    draw = np.random.default_rng(7)
    longest = 3 * max(max(pair) for pair in geometry.pinpoints)
    for _ in range(more):
        height, width = np.exp(draw.uniform(np.log(16), np.log(longest), 2)).astype(int)
        sizes.append((int(height), int(width)))
    return sizes
