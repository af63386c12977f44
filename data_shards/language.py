"""A guess at a text's language from its most frequent words, for the shares on a data card.

Labels: pt, en, es, fr, de, it; other (another script, or words of none of them); undecided (too
short, or two languages alike); none (nothing to read: numbers, formulas, program text). The words
are data (`language_words.yaml`). Limits: docs/data/variety.md; three words are the least, and
neighbours that are not listed, Galician above all, pass for Portuguese or Spanish.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

PORTUGUESE, UNDECIDED, OTHER, NONE = "pt", "undecided", "other", "none"
LABELS = (PORTUGUESE, "en", "es", "fr", "de", "it", OTHER, UNDECIDED, NONE)
WORD = re.compile(r"[^\W\d_]+")
_WORDS_FILE = Path(__file__).with_name("language_words.yaml")
_LEAD = 1.25  # times the next one's score
_ENOUGH, _ENOUGH_FOREIGN = 1.0, 1.5  # least score; a text counts as foreign only when that is sure
_SURE = 6.0  # from here on letters are not looked at
_LETTERS, _MOST_LETTERS = 5_000, 20  # characters of a text, hits of one language's letters
_RARE = 0.05  # share of known words below which a long text is in none of these languages
_MOST_WORDS = 2000
_LATIN = re.compile(r"[a-zà-öø-ÿœ]")
_CODE = re.compile(r"[{}\[\]=<>\\|_^&+$]")


@dataclass(frozen=True)
class _Words:
    scores: dict[str, tuple[tuple[str, float], ...]]  # word -> (language, weight)
    letters: tuple[tuple[str, re.Pattern[str]], ...]


def guess_language(text: str) -> str:
    """The label of one text."""
    text = text.lower()
    return language_of_words(WORD.findall(text), text)


def is_foreign(language: str) -> bool:
    """Whether the text is surely not Portuguese."""
    return language not in (PORTUGUESE, UNDECIDED, NONE)


def language_of_words(words: list[str], text: str) -> str:
    """`guess_language` for a text (lower case) whose words are known already."""
    words = words[:_MOST_WORDS]
    if not words:
        return NONE
    if not _is_latin(words):
        return OTHER
    data, scores = _words(), dict.fromkeys(LABELS[:6], 0.0)
    known = 0
    for word in words:
        if weights := data.scores.get(word):
            known += 1
            for language, weight in weights:
                scores[language] += weight
    if _is_code(text, known, len(words)):
        return NONE
    best, second = sorted(scores, key=lambda name: -scores[name])[:2]
    if scores[best] < _SURE or scores[best] < _LEAD * scores[second]:
        for language, pattern in data.letters:
            scores[language] += min(len(pattern.findall(text[:_LETTERS])), _MOST_LETTERS)
        best, second = sorted(scores, key=lambda name: -scores[name])[:2]
    if len(words) >= 20 and known < _RARE * len(words) and scores[best] < _SURE:
        return OTHER
    enough = _ENOUGH if best == PORTUGUESE else _ENOUGH_FOREIGN
    if scores[best] < enough or scores[best] < _LEAD * scores[second]:
        return UNDECIDED
    return best


def _is_latin(words: Iterable[str]) -> bool:
    """Whether most of the first letters are Latin."""
    letters = "".join(words)[:400]
    return 2 * len(_LATIN.findall(letters)) >= len(letters)


def _is_code(text: str, known: int, words: int) -> bool:
    """Many signs of formulas or programs, for few letters or few words of any language."""
    text = text[:10_000]
    signs = len(_CODE.findall(text))
    if signs < 3:
        return False
    return 6 * signs > sum(map(str.isalpha, text)) or (4 * signs > words and 6 * known < words)


@cache
def _words() -> _Words:
    data = yaml.safe_load(_WORDS_FILE.read_text(encoding="utf-8"))
    owners: dict[str, list[str]] = {}
    for language, words in data["words"].items():
        for word in dict.fromkeys(words.split()):
            owners.setdefault(word, []).append(language)
    # A word of several languages speaks for each of them, a little.
    scores = {
        word: tuple((language, 1 / len(shared) ** 1.5) for language in shared)
        for word, shared in owners.items()
    }
    letters = tuple(
        (language, re.compile(pattern)) for language, pattern in data["letters"].items()
    )
    return _Words(scores, letters)
