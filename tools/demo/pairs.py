"""Preference pairs: pt-PT over pt-BR wording, right answers over invented ones."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tools.demo.canvases import COLOURS, Scene, draw_scene
from tools.demo.language import StylePair, answer, applies
from tools.demo.questions import draw_questions, pick, scene_for_questions


def style_pair(
    rng: np.random.Generator, split: str, styles: Sequence[StylePair]
) -> tuple[Scene, str, str, str]:
    """(scene, question, pt-PT answer, pt-BR answer); the two say the same."""
    scene = draw_scene(rng, split)
    pair = pick(rng, styles)
    return scene, pair.question, *pair.answers(scene)


def truth_pair(rng: np.random.Generator, split: str) -> tuple[Scene, str, str, str]:
    """(scene, question, right answer, invented answer).

    The invented one is what the same wording would say of a scene that differs in one thing:
    the value of one digit, or the colour of the background, or a digit more or less.
    """
    while True:
        scene = scene_for_questions(rng, split)
        _, wording = draw_questions(rng, scene, 1)[0]
        right = answer(wording, scene)
        other = invent(rng, scene)
        if applies(wording, other) and answer(wording, other) != right:
            return scene, wording.question, right, answer(wording, other)


def invent(rng: np.random.Generator, scene: Scene) -> Scene:
    """A scene like this one but for one thing. It serves for words only, never for pixels."""
    kind = rng.random()
    digits = list(scene.digits)
    if kind < 0.2:
        others = [colour for colour in COLOURS if colour != scene.colour]
        return replace(scene, colour=others[rng.integers(len(others))])
    if kind < 0.4 and len(digits) > 2:
        del digits[rng.integers(len(digits))]
    elif kind < 0.4 and len(digits) in (1, 3):
        last = digits[-1]
        digits.append(replace(last, value=int(rng.integers(10)), column=last.column + 1))
    else:
        number = int(rng.integers(len(digits)))
        value = (digits[number].value + int(rng.integers(1, 10))) % 10
        digits[number] = replace(digits[number], value=value)
    return replace(scene, digits=tuple(digits))
