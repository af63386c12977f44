"""Pictures told in words: what the language model reads before it ever sees a picture.

At each image token stands the WORD for what lies there, in the exact anyres order: the base tile
row by row, then the canvas, each row ended by a line feed in place of `image_newline`. So the
decoder learns the geometry, and stage 1 has only to map features to words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data_shards.chat import ChatTokenizer
from models.anyres import NEWLINE, AnyresGeometry
from tools.demo import language
from tools.demo.canvases import COLOURS, Scene, draw_scene
from tools.demo.chats import draw_chat
from tools.demo.language import DIGITS, answer
from tools.demo.questions import draw_questions, pick, scene_for_questions
from tools.demo.sources import chat
from tools.demo.tiles import NO_DIGIT, patch_labels

PADDING_WORD = "nada"


class WordTable:
    """Token ids of the words that stand for patches: [6 colours, 12 labels] int64."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        def one(text: str) -> int:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) != 1:
                raise ValueError(f"{text!r} is {len(ids)} tokens, not 1; train the tokenizer again")
            return int(ids[0])

        digits = [one(f" {word}") for word in DIGITS]
        nothing = one(f" {PADDING_WORD}")
        self.newline = one("\n")
        self.ids = np.array([[*digits, one(f" {colour}"), nothing] for colour in COLOURS])


@dataclass(frozen=True)
class Noise:
    """How often a patch that shows a digit names another one (`wrong`) or none (`missed`).

    A patch is clear where its digit has a tile of its own. It is not where several digits are
    squashed into the base tile, or where the canvas cuts them; the tower often fails there, and a
    decoder that had learnt to trust such patches would have to unlearn it.
    """

    wrong: float = 0.0
    missed: float = 0.0
    unclear_wrong: float = 0.0
    unclear_missed: float = 0.0


def clear_patches(scene: Scene, geometry: AnyresGeometry) -> NDArray[np.bool_]:
    """Whether each patch is clear, bool [n_tiles * grid * grid]."""
    per_tile = geometry.grid**2
    rows, columns = geometry.tile_grid(scene.height, scene.width)
    one_cell = scene.rows == scene.columns == 1
    aligned = (rows, columns) == (scene.rows, scene.columns)
    return np.repeat([one_cell, aligned], [per_tile, rows * columns * per_tile])


def grid_words(
    scene: Scene,
    geometry: AnyresGeometry,
    table: WordTable,
    noise: Noise,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Token ids that stand for the picture, one per image token; int64 [n_tokens]."""
    labels = patch_labels(scene, geometry)
    is_digit, clear = labels < NO_DIGIT, clear_patches(scene, geometry)
    draw = rng.random(len(labels))
    wrong = draw < np.where(clear, noise.wrong, noise.unclear_wrong)
    missed = draw > 1 - np.where(clear, noise.missed, noise.unclear_missed)
    labels = np.where(is_digit & wrong, rng.integers(10, size=len(labels)), labels)
    labels = np.where(is_digit & missed, NO_DIGIT, labels)
    words = table.ids[COLOURS.index(scene.colour)][labels]
    rows = geometry.feature_rows(scene.height, scene.width)
    return np.where(rows == NEWLINE, table.newline, words[rows])


def brief_words(scene: Scene, table: WordTable) -> NDArray[np.int64]:
    """The picture at one word per cell and a margin on the left, rows ended by line feeds: where
    learning begins."""
    colour = table.ids[COLOURS.index(scene.colour)]
    words = np.full((scene.rows, scene.columns + 2), colour[NO_DIGIT])
    words[:, -1] = table.newline
    for digit in scene.digits:
        words[digit.row, digit.column + 1] = colour[digit.value]
    return words.reshape(-1)


@dataclass(frozen=True)
class Document:
    """Token ids int64 [n], and True where a token is trained on."""

    ids: NDArray[np.int64]
    targets: NDArray[np.bool_]


class TurnTokens:
    """Tokens of questions and answers, each text tokenised once: pre-training repeats them.

    Joined by `document`, they are what `ChatTokenizer.encode` gives for the whole chat.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.first = lru_cache(maxsize=None)(self._first)
        self.later = lru_cache(maxsize=None)(self._later)
        self.reply = lru_cache(maxsize=65536)(self._reply)

    def _first(self, question: str, with_image: bool) -> NDArray[np.int64]:
        message = chat([(question, "")], with_image)[:1]
        return self.tokenizer.encode_prompt(message, [1] if with_image else [])

    def _later(self, question: str) -> NDArray[np.int64]:
        before = chat([("a", "b")], False)
        whole = [*before, *chat([(question, "")], False)[:1]]
        return self.tokenizer.encode_prompt(whole)[len(self.tokenizer.encode(before).ids) :]

    def _reply(self, text: str) -> NDArray[np.int64]:
        encoded = self.tokenizer.encode(chat([("a", text)], False))
        return encoded.ids[encoded.targets]

    def document(
        self, turns: Sequence[tuple[str, str]], words: NDArray[np.int64] | None
    ) -> Document:
        """A chat; `words` stand in place of its picture, None for a chat without one."""
        pieces: list[tuple[NDArray[np.int64], bool]] = []
        for number, (question, reply) in enumerate(turns):
            if number:
                pieces.append((self.later(question), False))
            elif words is None:
                pieces.append((self.first(question, False), False))
            else:
                prompt = self.first(question, True)
                place = int(np.flatnonzero(prompt == self.tokenizer.image_token_id)[0])
                pieces += [(prompt[:place], False), (words, False), (prompt[place + 1 :], False)]
            pieces.append((self.reply(reply), True))
        return Document(
            np.concatenate([ids for ids, _ in pieces]),
            np.concatenate([np.full(len(ids), target) for ids, target in pieces]),
        )


def draw_document(
    rng: np.random.Generator,
    tokens: TurnTokens,
    table: WordTable,
    geometry: AnyresGeometry,
    noise: Noise,
    text_share: float,
    turns: int,
    brief: float = 0.0,
) -> Document:
    """A chat about a text grid, or (`text_share`) a chat without one; `brief` is the share of
    pictures told at one word per cell."""
    if rng.random() < text_share:
        return tokens.document([draw_chat(rng) for _ in range(turns + 1)], None)
    scene, pairs = _conversation(rng, turns)
    if rng.random() < brief:
        return tokens.document(pairs, brief_words(scene, table))
    return tokens.document(pairs, grid_words(scene, geometry, table, noise, rng))


def _conversation(rng: np.random.Generator, turns: int) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene and what is said of it: questions, or a caption, or a wording of either country."""
    kind = rng.random()
    if kind < 0.7:
        scene = scene_for_questions(rng, "train")
        wordings = [wording for _, wording in draw_questions(rng, scene, turns)]
        return scene, [(wording.question, answer(wording, scene)) for wording in wordings]
    scene = draw_scene(rng, "train")
    if kind < 0.85:
        wording = pick(rng, language.CAPTIONS)
        return scene, [(wording.question, answer(wording, scene))]
    style = pick(rng, (*language.STYLES, *language.UNSEEN_STYLES))
    return scene, [(style.question, style.answers(scene)[rng.integers(2)])]


def length_buckets(
    documents: Iterator[Document], batch: int, pool: int, rng: np.random.Generator
) -> Iterator[list[Document]]:
    """Batches of documents of like length, out of pools of `pool` batches, in random order."""
    while True:
        drawn = [next(documents) for _ in range(batch * pool)]
        drawn.sort(key=lambda document: len(document.ids))
        for number in rng.permutation(pool):
            yield drawn[number * batch : (number + 1) * batch]
