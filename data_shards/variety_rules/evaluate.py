"""How often labels are right, on a labelled set: `python -m data_shards.variety_rules.evaluate F`.

F has lines LABEL, tab, TEXT; the label is pt-PT or pt-BR. Prints one row for each label: how many
texts got which label, and of the decided ones the share that is right, with its 95 % interval.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from data_shards.variety import LABELS, classify
from data_shards.variety_rules.load import PT_BR, PT_PT


@dataclass(frozen=True)
class Outcome:
    """Labels that the texts of one variety got."""

    truth: str
    got: Counter[str]

    @property
    def texts(self) -> int:
        return self.got.total()

    @property
    def right(self) -> int:
        return self.got[self.truth]

    @property
    def wrong(self) -> int:
        """Texts that got the other variety."""
        return self.got[PT_BR if self.truth == PT_PT else PT_PT]


def evaluate(texts: Iterable[tuple[str, str]]) -> list[Outcome]:
    """Outcomes for (label, text) pairs, pt-PT first.

    Raises:
        ValueError: a label is neither pt-PT nor pt-BR.
    """
    got: dict[str, Counter[str]] = {PT_PT: Counter(), PT_BR: Counter()}
    for truth, text in texts:
        if truth not in got:
            raise ValueError(f"label {truth!r} is neither {PT_PT} nor {PT_BR}")
        got[truth][classify(text).label] += 1
    return [Outcome(truth, counts) for truth, counts in got.items()]


def interval(part: int, whole: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (E. B. Wilson, 1927)."""
    if not whole:
        return 0.0, 1.0
    z, share = 1.959964, part / whole
    middle = share + z * z / (2 * whole)
    half = z * sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    scale = 1 + z * z / whole
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    lines = ["| text | n | " + " | ".join(LABELS) + " | right of decided |", "|---" * 7 + "|"]
    for one in outcomes:
        decided = one.right + one.wrong
        low, high = interval(one.right, decided)
        shares = " | ".join(f"{100 * one.got[label] / max(one.texts, 1):.1f} %" for label in LABELS)
        right = f"{100 * one.right / max(decided, 1):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"| {one.truth} | {one.texts:,} | {shares} | {right} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    try:
        (name,) = arguments
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        pairs = [line.split("\t", 1) for line in lines if line]
        bad = next((n for n, pair in enumerate(pairs, 1) if len(pair) != 2), None)
        if bad is not None:
            raise ValueError(f"{name}: line {bad} has no tab between label and text")
        print(table(evaluate((label, text) for label, text in pairs)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
