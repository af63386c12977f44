"""The demo's training sources, as rows and then as Parquet files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tools.demo import language
from tools.demo.canvases import Scene, draw_scene
from tools.demo.chats import draw_chat
from tools.demo.language import PROMPT_IMAGE, answer
from tools.demo.pairs import style_pair, truth_pair
from tools.demo.questions import draw_questions, pick, png, scan_numbers, scene_for_questions

Row = dict[str, Any]


class Counts(NamedTuple):
    """Rows of each source, and of each evaluation set."""

    captions: int = 4000
    vqa: int = 9000
    text: int = 1000
    style: int = 1200
    preferences: int = 1500
    questions: int = 400  # of dev and of held_out each, the same number of every kind
    pairs: int = 160  # of each kind of pair in each of dev and held_out


SOURCES = ("captions", "vqa", "text", "style", "preferences")
STYLE_SHARE = 0.6  # of the preference pairs; the others are right over invented
MAX_TURNS = 4

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
TRAINING_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("images", pa.list_(pa.binary())),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("kind", pa.string()),
        ("scans", pa.list_(pa.int64())),  # scans shown, by their number in scikit-learn's data
    ]
)


def chat(turns: Sequence[tuple[str, str]], with_image: bool) -> list[dict[str, str]]:
    """Messages of (question, answer) turns; the picture stands before the first question."""
    messages = []
    for number, (question, reply) in enumerate(turns):
        prefix = PROMPT_IMAGE if with_image and number == 0 else ""
        messages.append({"role": "user", "content": prefix + question})
        messages.append({"role": "assistant", "content": reply})
    return messages


def training_rows(source: str, n: int, seed: int) -> Iterator[Row]:
    """The `n` rows of a source; a pure function of its arguments."""
    rng = np.random.default_rng([seed, SOURCES.index(source)])
    for number in range(n):
        row = _ROWS[source](rng)
        yield {"key": f"{source}-{number:05d}", "chosen": None, "rejected": None, **row}


def _caption(rng: np.random.Generator) -> Row:
    scene = draw_scene(rng, "train")
    wording = pick(rng, language.CAPTIONS)
    return _shown(scene, chat([(wording.question, answer(wording, scene))], True), "caption")


def _vqa(rng: np.random.Generator) -> Row:
    scene = scene_for_questions(rng, "train")
    questions = draw_questions(rng, scene, int(rng.integers(1, MAX_TURNS + 1)))
    turns = [(wording.question, answer(wording, scene)) for _, wording in questions]
    return _shown(scene, chat(turns, True), "vqa")


def _text(rng: np.random.Generator) -> Row:
    turns = [draw_chat(rng) for _ in range(rng.integers(1, MAX_TURNS + 1))]
    return {"messages": chat(turns, False), "images": [], "kind": "text", "scans": []}


def _style(rng: np.random.Generator) -> Row:
    """pt-PT and pt-BR alike: what the third stage is there to sort out."""
    scene = draw_scene(rng, "train")
    pair = pick(rng, language.STYLES)
    reply = pair.answers(scene)[rng.integers(2)]
    return _shown(scene, chat([(pair.question, reply)], True), "style")


def _preference(rng: np.random.Generator) -> Row:
    if rng.random() < STYLE_SHARE:
        scene, question, chosen, rejected = style_pair(rng, "train", language.STYLES)
        kind = "style"
    else:
        scene, question, chosen, rejected = truth_pair(rng, "train")
        kind = "truth"
    messages = chat([(question, "")], True)[:1]
    return {**_shown(scene, messages, kind), "chosen": chosen, "rejected": rejected}


def _shown(scene: Scene, messages: list[dict[str, str]], kind: str) -> Row:
    return {
        "messages": messages,
        "images": [png(scene)],
        "kind": kind,
        "scans": scan_numbers(scene),
    }


_ROWS = {
    "captions": _caption,
    "vqa": _vqa,
    "text": _text,
    "style": _style,
    "preferences": _preference,
}


def write_parquet(rows: Iterator[Row], schema: pa.Schema, path: Path) -> int:
    """Write aside, then rename; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema)
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return table.num_rows
