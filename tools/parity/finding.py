"""One thing that was compared, and what came out."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Finding:
    """`worst` and `limit` are in the units of what was compared; None where it is yes or no."""

    name: str
    passed: bool
    detail: str
    worst: float | None = None
    limit: float | None = None

    def line(self) -> str:
        """For the terminal."""
        mark = "ok  " if self.passed else "FAIL"
        numbers = "" if self.worst is None else f" (worst {self.worst:.3g}, limit {self.limit:.3g})"
        return f"{mark} {self.name}: {self.detail}{numbers}"

    def as_json(self) -> dict[str, Any]:
        """For the certificate."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def yes_or_no(name: str, problems: Sequence[str], good: str) -> Finding:
    """Passed where there is no problem; the first few are named."""
    if not problems:
        return Finding(name, True, good)
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Finding(name, False, "; ".join(problems[:3]) + more)


def largest_difference(
    name: str, pairs: Iterator[tuple[str, np.ndarray, np.ndarray]], limit: float, what: str
) -> Finding:
    """The largest absolute difference over all pairs of arrays, each named."""
    worst, where, count = 0.0, "", 0
    for label, ours, theirs in pairs:
        count += 1
        if ours.shape != theirs.shape:
            shapes = f"{label}: shape {list(ours.shape)} here, {list(theirs.shape)} there"
            return Finding(name, False, shapes)
        difference = float(np.abs(ours.astype(np.float64) - theirs).max()) if ours.size else 0.0
        if not difference <= worst:  # also where it is not a number
            worst, where = difference, label
    passed = worst <= limit
    detail = f"{count} {what}" + ("" if passed else f", the worst: {where}")
    return Finding(name, passed, detail, worst, limit)
