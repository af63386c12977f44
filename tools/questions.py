"""Evaluation questions and preference pairs, as Parquet files hold them.

Questions: columns `image` (encoded bytes), `question`, `answer`, `kind`, `layout`.
Pairs: `image` (encoded bytes or null), `question`, `chosen`, `rejected`, `kind`.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Question:
    """One picture, one question, the one right answer; `kind` and `layout` group the scores."""

    image: bytes
    question: str
    answer: str
    kind: str
    layout: str


@dataclass(frozen=True)
class Pair:
    """A preferred and a rejected answer to the same prompt; `image` may be None."""

    image: bytes | None
    question: str
    chosen: str
    rejected: str
    kind: str


def read_questions(path: Path) -> list[Question]:
    """Every row of a question file; ValueError naming file and column when it is not one."""
    return [Question(**row) for row in _rows(path, Question)]


def read_pairs(path: Path) -> list[Pair]:
    """Every row of a pair file; ValueError naming file and column when it is not one."""
    return [Pair(**row) for row in _rows(path, Pair)]


def _rows(path: Path, kind: type) -> list[dict[str, Any]]:
    columns = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    remedy = "make the evaluation files again (python -m tools.demo_data)"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {remedy}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from None
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise ValueError(f"{path} has no column {absent[0]!r}; {remedy}")
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows; {remedy}")
    rows: list[dict[str, Any]] = table.select(columns).to_pylist()
    return rows


def chance(questions: Sequence[Question]) -> dict[str, float]:
    """Exact match without looking at the picture, two ways, both per wording of the question.

    `majority`: always the commonest answer to that wording in these very questions (an upper
    bound). `shuffled`: the answer of another question of the same wording, drawn at random (its
    expected value, so no seed).
    """
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        groups[question.question][question.answer] += 1
    majority = shuffled = 0.0
    for answers in groups.values():
        size = answers.total()
        majority += max(answers.values())
        if size > 1:
            shuffled += sum(count * (count - 1) for count in answers.values()) / (size - 1)
    return {"majority": majority / len(questions), "shuffled": shuffled / len(questions)}


def exact_match(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Share of answers that equal the right one, blank space at the ends aside.

    `{"all": 0.83, "count": 400, "kind": {...}, "layout": {...}}`
    """
    right = [
        question.answer.strip() == answer.strip()
        for question, answer in zip(questions, answers, strict=True)
    ]
    result: dict[str, Any] = {"all": _mean(right), "count": len(right)}
    for group in ("kind", "layout"):
        members: dict[str, list[bool]] = defaultdict(list)
        for question, hit in zip(questions, right, strict=True):
            members[getattr(question, group)].append(hit)
        result[group] = {name: _mean(hits) for name, hits in sorted(members.items())}
    return result


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
