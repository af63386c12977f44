"""A label for the variety of Portuguese of a text: pt-PT, pt-BR, undecided or other.

Rules only (`variety_rules.py`), no model. Limits: never measured on a labelled set, so no accuracy
is claimed; short texts, and texts that avoid what differs, are "undecided", which is most of them;
quotations, names and mixed texts mislead it. Use it to report shares, with "undecided" shown, not
to judge a single sample.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_shards.variety_rules import OTHER, PORTUGUESE, PT_BR, PT_PT

LABELS = ("pt-PT", "pt-BR", "undecided", "other")
_ENOUGH_WORDS = 4  # fewer cannot be called another language
_MAX_CHARACTERS = 20_000  # more tells nothing new

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Verdict:
    """The label and the points that each variety's rules gave."""

    label: str
    pt_pt: int
    pt_br: int


def _compile(rules: Sequence[tuple[str, int]]) -> list[tuple[re.Pattern[str], int]]:
    return [(re.compile(rf"(?<!\w)(?:{pattern})(?!\w)"), points) for pattern, points in rules]


_PT_PT, _PT_BR = _compile(PT_PT), _compile(PT_BR)
_ONLY_PORTUGUESE = frozenset(PORTUGUESE) - frozenset(OTHER)
_ONLY_OTHER = frozenset(OTHER) - frozenset(PORTUGUESE)


def classify(text: str) -> Verdict:
    """The variety of `text`; a variety needs two points more than the other one."""
    text = text[:_MAX_CHARACTERS].lower()
    words = _WORD.findall(text)
    portuguese = sum(word in _ONLY_PORTUGUESE for word in words)
    other = sum(word in _ONLY_OTHER for word in words)
    if len(words) >= _ENOUGH_WORDS and other > portuguese:
        return Verdict("other", 0, 0)
    pt_pt, pt_br = _points(_PT_PT, text), _points(_PT_BR, text)
    if pt_pt >= pt_br + 2:
        return Verdict("pt-PT", pt_pt, pt_br)
    if pt_br >= pt_pt + 2:
        return Verdict("pt-BR", pt_pt, pt_br)
    return Verdict("undecided", pt_pt, pt_br)


def _points(rules: Sequence[tuple[re.Pattern[str], int]], text: str) -> int:
    return sum(points * len(pattern.findall(text)) for pattern, points in rules)
