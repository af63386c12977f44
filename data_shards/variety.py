"""A label for the variety of Portuguese of a text: pt-PT, pt-BR, undecided or other.

By rules, which are data (`variety_rules/`); docs/data/variety.md says what they are worth. Texts
that are short, or that avoid what differs, are "undecided", which is most of them; quotations and
names mislead it. Use it to report shares, with "undecided" shown, not to judge a single sample.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from data_shards.language import PORTUGUESE, WORD, is_foreign, language_of_words
from data_shards.variety_rules.load import PT_BR, PT_PT, Rule, rules, rules_digest

LABELS = (PT_PT, PT_BR, "undecided", "other")
VERSION = f"2 {rules_digest()}"  # verdicts may differ when it does; the number is the code's
MAX_CHARACTERS = 20_000  # more tells nothing new
MARGIN = 2  # points that a variety needs beyond the other's
RATIO = 2  # and how many times the other's points
_LONGEST_WORD = 30  # letters of a word that is remembered
_ACCENTED = re.compile(r"[áéóêôüç]")


@dataclass(frozen=True)
class Verdict:
    """The label, the language, the points of each variety's rules, and how often each rule hit."""

    label: str
    language: str
    pt_pt: int
    pt_br: int
    hits: Mapping[str, int] = field(default_factory=dict)  # rule id -> times found


def classify(text: str) -> Verdict:
    """The variety of `text` (its first 20,000 characters).

    A variety needs two points more than the other one and at least twice as many.
    """
    text = text[:MAX_CHARACTERS].lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    words = WORD.findall(text)
    language = language_of_words(words, text)
    if is_foreign(language):
        return Verdict("other", language, 0, 0)
    hits = _matcher().hits(text, words)
    points = {PT_PT: 0, PT_BR: 0}
    for name, times in hits.items():
        rule = _matcher().rules[name]
        points[rule.variety] += rule.points * min(times, rule.most)
    ours, theirs = points[PT_PT], points[PT_BR]
    label = "undecided"
    if ours >= theirs + MARGIN and ours >= RATIO * theirs:
        label = PT_PT
    elif theirs >= ours + MARGIN and theirs >= RATIO * ours:
        label = PT_BR
    if label != "undecided" and language != PORTUGUESE:
        language = PORTUGUESE  # too short for the language's own words, but not for a rule
    return Verdict(label, language, ours, theirs, hits)


class Matcher:
    """All rules at once: words are looked up, a pattern is tried only where a word of it occurs."""

    def __init__(self, chosen: tuple[Rule, ...]):
        self.rules = {rule.id: rule for rule in chosen}
        self._words: dict[str, str] = {}  # word -> rule
        self._phrases: dict[str, list[tuple[str, str]]] = defaultdict(
            list
        )  # word -> (phrase, rule)
        self._triggered: dict[str, list[tuple[str, re.Pattern[str]]]] = defaultdict(list)
        self._always: list[tuple[str, re.Pattern[str]]] = []
        self._shapes: list[tuple[str, re.Pattern[str]]] = []  # matched with accented words
        self._shape_of: dict[str, str] = {}  # accented word -> rule or ""
        for rule in chosen:
            self._add(rule)

    def hits(self, text: str, words: list[str]) -> dict[str, int]:
        """How often each rule is found; `text` in lower case, `words` its words."""
        distinct = set(words)
        counts: Counter[str] = Counter()
        for word in distinct & self._words.keys():
            counts[self._words[word]] += words.count(word)
        if not text.isascii():
            for word in distinct:
                if not word.isascii() and word not in self._words and (rule := self._shape(word)):
                    counts[rule] += words.count(word)
        for word in distinct & self._phrases.keys():
            for phrase, name in self._phrases[word]:
                if phrase in text and (found := _count_phrase(phrase, text)):
                    counts[name] += found
        patterns = dict(self._always)
        for word in distinct & self._triggered.keys():
            patterns.update(self._triggered[word])
        for name, pattern in patterns.items():
            if found := sum(1 for _ in pattern.finditer(text)):
                counts[name] += found
        return dict(sorted(counts.items()))

    def _add(self, rule: Rule) -> None:
        for form in rule.forms:
            parts = WORD.findall(form)
            if parts != [form]:
                self._phrases[max(parts, key=len)].append((form, rule.id))
            elif form in self._words:
                raise ValueError(f"{form} stands in {self._words[form]} and in {rule.id}")
            else:
                self._words[form] = rule.id
        if rule.pattern and rule.words:
            self._shapes.append((rule.id, re.compile(rule.pattern)))
        elif rule.pattern:
            entry = (rule.id, re.compile(rule.pattern))
            for word in rule.needs:
                self._triggered[word].append(entry)
            if not rule.needs:
                self._always.append(entry)

    def _shape(self, word: str) -> str:
        """The rule that a word's spelling alone fits, or "". Remembered: words repeat."""
        known = self._shape_of.get(word)
        if known is None:
            known = ""
            if _ACCENTED.search(word):
                known = next((name for name, p in self._shapes if p.fullmatch(word)), "")
            if len(word) <= _LONGEST_WORD and len(self._shape_of) < 100_000:
                self._shape_of[word] = known
        return known


def _count_phrase(phrase: str, text: str) -> int:
    """Occurrences between word boundaries."""
    count, end = 0, 0
    while (start := text.find(phrase, end)) >= 0:
        end = start + len(phrase)
        inside = text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()
        count += not inside
    return count


@cache
def _matcher() -> Matcher:
    return Matcher(rules())
