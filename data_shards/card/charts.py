"""Charts of the card as SVG text: numbers and escaped labels, no scripts, nothing from outside."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

INK, SOFT, LINE, BLUE = "#1c2430", "#5d6878", "#dde2ea", "#2f6db5"
_FONT = 'font-family="system-ui, sans-serif" font-size="11"'


def columns(labels: Sequence[str], counts: Sequence[int], title: str, bins: bool = False) -> str:
    """A column for each count; labels in the middle, or where a bin begins."""
    width, height, top, bottom, left = 540, 210, 22, 24, 6
    each = min((width - 2 * left) / max(len(counts), 1), width if bins else 64)
    most, every = max([*counts, 1]), max(1, -(-len(labels) * 46 // (width - 2 * left)))
    total, parts = max(sum(counts), 1), []
    for number, count in enumerate(counts):
        tall = (height - top - bottom) * count / most
        tall = max(tall, 1.5) if count else 0
        x, y = left + number * each, height - bottom - tall
        told = f"{escape(labels[number])}: {count:,} ({_percent(count / total)})"
        parts.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(each - 1, 0.8):.2f}" height="{tall:.2f}" '
            f'fill="{BLUE}"><title>{told}</title></rect>'
        )
        if number % every == 0:
            at, anchor = (x, "start") if bins else (x + each / 2, "middle")
            parts.append(_text(at, height - bottom + 15, labels[number], anchor))
        if each > 34 and count and not bins:
            parts.append(_text(x + each / 2, y - 4, _percent(count / total), anchor="middle"))
    base = height - bottom + 0.5
    parts.append(f'<path d="M{left} {base}H{width - left}" stroke="{SOFT}"/>')
    if each <= 34 or bins:
        parts.append(_text(width - left, 14, f"tallest {most:,}", anchor="end"))
    return _svg(width, height, title, parts)


def shares(counts: Mapping[str, int], colours: Mapping[str, str], title: str) -> str:
    """One bar cut into shares, as wide as the page."""
    width, height, x = 1000, 30, 0.0
    total, parts = max(sum(counts.values()), 1), []
    for label, count in counts.items():
        wide = width * count / total
        told = f"{escape(label)}: {count:,} ({_percent(count / total)})"
        parts.append(
            f'<rect x="{x:.2f}" y="0" width="{wide:.2f}" height="{height}" '
            f'fill="{colours.get(label, SOFT)}"><title>{told}</title></rect>'
        )
        x += wide
    return _svg(width, height, title, parts, 'preserveAspectRatio="none" class="wide"')


def table_of_sizes(counts: np.ndarray, per_doubling: int, title: str) -> str:
    """How often images are so wide (to the right) and so high (upwards), darker for more."""
    used = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    size = max(4, min(34, 300 // (last - first)))
    left, top = 44, 8
    side = size * (last - first)
    parts = [
        f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="#f3f5f8"/>',
        f'<path d="M{left} {top + side}L{left + side} {top}" stroke="{LINE}"/>',
    ]
    most = float(np.log1p(counts.max()))
    for row, column in zip(*(axis.tolist() for axis in counts.nonzero()), strict=True):
        share = np.log1p(counts[row, column]) / most
        x, y = left + (column - first) * size, top + side - (row - first + 1) * size
        wide, high = (round(2 ** (step / per_doubling)) for step in (column, row))
        parts.append(
            f'<rect x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" fill="{BLUE}" '
            f'fill-opacity="{0.12 + 0.88 * share:.3f}"><title>from {wide} by {high} px: '
            f"{int(counts[row, column]):,}</title></rect>"
        )
    every = per_doubling * max(1, (last - first) // (6 * per_doubling))
    for step in range(-(-first // per_doubling) * per_doubling, last + 1, every):
        at, label = (step - first) * size, f"{round(2 ** (step / per_doubling)):,}"
        parts.append(_text(left + at, top + side + 15, label, anchor="middle"))
        parts.append(_text(left - 5, top + side - at + 4, label, anchor="end"))
    return _svg(left + side + 20, top + side + 22, title, parts)


def equal_bins(counts: np.ndarray, most_bins: int = 28) -> tuple[list[str], list[int]]:
    """(labels, counts) of a count for each value, put into bins of a round width.

    The last bin takes the longest 0.2 % with it and is marked with "+".
    """
    ends = np.cumsum(counts)
    if not len(ends) or not ends[-1]:
        return [], []
    longest, most = int(np.searchsorted(ends, 0.998 * ends[-1])), int(np.flatnonzero(counts)[-1])
    width = next(
        w * 10**power
        for power in range(9)
        for w in (1, 2, 5)
        if longest < w * 10**power * most_bins
    )
    first = int(np.flatnonzero(counts)[0]) // width
    bins = longest // width + 1
    totals = [int(counts[b * width : (b + 1) * width].sum()) for b in range(first, bins)]
    totals[-1] += int(counts[bins * width :].sum())
    labels = [f"{b * width:,}" for b in range(first, bins)]
    labels[-1] += "+" if most >= bins * width else ""
    return labels, totals


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{SOFT}" text-anchor="{anchor}" {_FONT}>'
        f"{escape(text)}</text>"
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str], more: str = "") -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title, quote=True)}" {more}>{"".join(parts)}</svg>'
    )
