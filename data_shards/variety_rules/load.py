"""Reads the rules of both varieties from the files beside it; docs/data/variety.md lists them.

`lexicon.tsv`: one line for each pair of words. Columns: category, pt-PT forms, pt-BR forms, points
(PT/BR; 0: that side is no rule, because the other variety says it too), example, note. `(s)` in a
form stands for with and without; `-` for no form; `{a/b}` in the example for what each variety
writes there, which makes it a hit of one rule and a counter-example of the other.
`patterns.yaml`: regular expressions, for what a list of words cannot say, and the categories.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

PT_PT, PT_BR = "pt-PT", "pt-BR"
_FOLDER = Path(__file__).parent
_COLUMNS = 6
_ENDING = re.compile(r"\((\w+)\)")
_SLOT = re.compile(r"\{([^/}]*)/([^}]*)\}")


@dataclass(frozen=True)
class Rule:
    """One sign of a variety.

    Attributes:
        id: unique, shown with its count on the data card.
        variety: pt-PT or pt-BR.
        points: 2 for what the other variety hardly writes, 1 for a tendency.
        category: a key of `categories`.
        forms: words or phrases, lower case; empty if the rule is a pattern.
        pattern: regular expression on lower-case text; a whole word where `words` is set.
        words: the pattern is matched with single words, not with the text.
        needs: words of which one must be in the text before the pattern is tried.
        hits, misses: texts in which it must be found, and texts in which it must not.
        most: hits in one text that count; more are one habit, said again.
        note: why, and where it does not hold.
    """

    id: str
    variety: str
    points: int
    category: str
    forms: tuple[str, ...] = ()
    pattern: str = ""
    words: bool = False
    needs: tuple[str, ...] = ()
    hits: tuple[str, ...] = ()
    misses: tuple[str, ...] = ()
    most: int = 3
    note: str = ""


@cache
def rules() -> tuple[Rule, ...]:
    """Every rule, the lexicon's first, in the order of the files.

    Raises:
        ValueError: a line or an entry that is not as described above; names file and entry.
    """
    found = (*_lexicon(_FOLDER / "lexicon.tsv"), *_patterns(_FOLDER / "patterns.yaml"))
    seen: dict[str, Rule] = {}
    for rule in found:
        if rule.id in seen:
            raise ValueError(f"{_FOLDER}: two rules are called {rule.id}; rename one")
        seen[rule.id] = rule
    return found


def rules_digest() -> str:
    """SHA-256 of the rules and of the words that tell languages."""
    files = sorted(
        (*_FOLDER.glob("*.tsv"), *_FOLDER.glob("*.yaml"), *_FOLDER.parent.glob("*.yaml"))
    )
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


@cache
def categories() -> dict[str, str]:
    """Category -> what its rules rest on."""
    return dict(_yaml(_FOLDER / "patterns.yaml")["categories"])


def _lexicon(path: Path) -> Iterator[Rule]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != _COLUMNS:
            raise ValueError(f"{path}:{number}: {len(cells)} cells, not {_COLUMNS}")
        category, ours, theirs, points, example, note = cells
        if category not in categories():
            raise ValueError(f"{path}:{number}: category {category} is not in patterns.yaml")
        if not _SLOT.search(example):
            raise ValueError(f"{path}:{number}: the example has no {{pt-PT/pt-BR}}")
        texts = [_SLOT.sub(rf"\{side}", example) for side in (1, 2)]
        for side, (variety, forms, worth) in enumerate(
            zip((PT_PT, PT_BR), (ours, theirs), points.split("/"), strict=True)
        ):
            if int(worth) == 0:
                continue
            expanded = tuple(form for cell in forms.split(", ") for form in _expand(cell))
            yield Rule(
                id=expanded[0],
                variety=variety,
                points=int(worth),
                category=category,
                forms=expanded,
                hits=(texts[side],),
                misses=(texts[1 - side],),
                note=note,
            )


def _expand(form: str) -> list[str]:
    """`casa(s) de banho` -> casa de banho, casas de banho."""
    pieces = _ENDING.split(form)  # text, ending, text, ...
    endings = [("", piece) if number % 2 else (piece,) for number, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in product(*endings)]


def _patterns(path: Path) -> Iterator[Rule]:
    for entry in _yaml(path)["rules"]:
        unknown = set(entry) - set(Rule.__dataclass_fields__)
        if unknown or entry["category"] not in categories():
            raise ValueError(f"{path}: {entry['id']}: {unknown or entry['category']} is unknown")
        lists = {name: tuple(entry.get(name, ())) for name in ("needs", "hits", "misses")}
        forms = tuple(form for word in entry.get("forms", "").split() for form in _expand(word))
        yield Rule(**{**entry, **lists, "forms": forms})


@cache
def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
