"""Scenes with the questions to ask about them, and their pictures as PNG files."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from tools.demo import language
from tools.demo.canvases import Scene, draw_scene, load_scans, render
from tools.demo.language import Wording, applies


def png(scene: Scene) -> bytes:
    """The picture of a scene as a PNG file."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def scan_numbers(scene: Scene) -> list[int]:
    """Which of scikit-learn's scans the picture shows."""
    numbers = load_scans()[scene.split].numbers
    return [int(numbers[digit.scan]) for digit in scene.digits]


def pick(rng: np.random.Generator, wordings: Sequence[Any]) -> Any:
    """One of `wordings`, all alike."""
    return wordings[int(rng.integers(len(wordings)))]


def draw_questions(rng: np.random.Generator, scene: Scene, turns: int) -> list[tuple[str, Wording]]:
    """Up to `turns` (kind, wording) that apply to the scene, no wording twice.

    The kind is drawn first, `count` and `bg` half as often as the others: they are easier.
    """
    left = {
        kind: [wording for wording in wordings if applies(wording, scene)]
        for kind, wordings in language.QUESTIONS.items()
    }
    chosen: list[tuple[str, Wording]] = []
    for _ in range(turns):
        kinds = [kind for kind, wordings in left.items() if wordings]
        weights = np.array([1.0 if kind in ("count", "bg") else 2.0 for kind in kinds])
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        wordings = left[kind]
        chosen.append((kind, wordings.pop(rng.integers(len(wordings)))))
    return chosen


def scene_for_questions(rng: np.random.Generator, split: str) -> Scene:
    """A scene of the training mixture: two digits more often than `draw_scene` alone has them,
    because only they can be summed."""
    if rng.random() < 0.25:
        layouts = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1)]
        return draw_scene(rng, split, layouts[rng.integers(len(layouts))], n_digits=2)
    return draw_scene(rng, split)
