"""The demo's evaluation sets: questions and preference pairs on scans that training never shows.

Settings are chosen on dev; held_out is scored once.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tools.demo import language
from tools.demo.language import answer, applies
from tools.demo.pairs import style_pair, truth_pair
from tools.demo.questions import pick, png, scan_numbers, scene_for_questions
from tools.demo.sources import Row

QUESTION_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("layout", pa.string()),
        ("scans", pa.list_(pa.int64())),
    ]
)
PAIR_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("question", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("kind", pa.string()),
        ("scans", pa.list_(pa.int64())),
    ]
)


def question_rows(split: str, n: int, seed: int) -> Iterator[Row]:
    """`n` questions of one turn, the kinds by turns, on scans of `split` only."""
    rng = np.random.default_rng([seed, 100, ("dev", "held_out").index(split)])
    for number in range(n):
        kind = language.KINDS[number % len(language.KINDS)]
        scene = scene_for_questions(rng, split)
        wording = pick(rng, language.QUESTIONS[kind])
        while not applies(wording, scene):
            scene = scene_for_questions(rng, split)
        yield {
            "key": f"{split}-{number:05d}",
            "image": png(scene),
            "question": wording.question,
            "answer": answer(wording, scene),
            "kind": kind,
            "layout": scene.layout,
            "scans": scan_numbers(scene),
        }


def pair_rows(split: str, n: int, seed: int) -> Iterator[Row]:
    """`n` pairs of each kind: `style`, `style_unseen` (wordings of no stage), `truth`."""
    rng = np.random.default_rng([seed, 200, ("dev", "held_out").index(split)])
    for kind in ("style", "style_unseen", "truth"):
        for number in range(n):
            if kind == "truth":
                scene, question, chosen, rejected = truth_pair(rng, split)
            else:
                styles = language.STYLES if kind == "style" else language.UNSEEN_STYLES
                scene, question, chosen, rejected = style_pair(rng, split, styles)
            yield {
                "key": f"{split}-{kind}-{number:05d}",
                "image": png(scene),
                "question": question,
                "chosen": chosen,
                "rejected": rejected,
                "kind": kind,
                "scans": scan_numbers(scene),
            }
