"""Small SVG charts for the report: lines and grouped bars, no library, no script."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = ("#1f5fa8", "#c2571a", "#2c8a4b", "#7a4fa3", "#8a6d1d")
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 34


@dataclass(frozen=True)
class Line:
    """One curve; `faint` draws it thin and pale, behind the others."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = COLOURS[0]
    faint: bool = False


def smooth(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Mean over a centred window of `share` of the curve's length, at least 3 points."""
    half = max(1, round(len(values) * share / 2))
    found = []
    for middle in range(len(values)):
        window = values[max(0, middle - half) : middle + half + 1]
        found.append(sum(window) / len(window))
    return found


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) covering [low, high]."""
    if high <= low:
        high = low + 1
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough - 1e-12)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    width: int = 424,
    height: int = 230,
    reference: tuple[float, str] | None = None,
    zero: bool = False,
) -> Markup:
    """Curves over one pair of axes; `reference` is a dashed level with its name."""
    drawn = [line for line in lines if line.xs]
    if not drawn:
        return Markup("")
    ys = [y for line in drawn for y in line.ys if math.isfinite(y)]
    if reference is not None:
        ys.append(reference[0])
    if zero:
        ys.append(0.0)
    x_ticks = ticks(0, max(max(line.xs) for line in drawn))
    y_ticks = ticks(min(ys), max(ys))
    plot = _Axes(width, height, (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    parts = plot.frame(title, x_label, x_ticks, y_ticks)
    for line in sorted(drawn, key=lambda line: not line.faint):
        points = " ".join(
            f"{plot.x(x):.1f},{plot.y(y):.1f}"
            for x, y in zip(line.xs, line.ys, strict=True)
            if math.isfinite(y)
        )
        style = "stroke-width='1' opacity='0.35'" if line.faint else "stroke-width='2'"
        parts.append(f"<polyline points='{points}' fill='none' stroke='{line.colour}' {style}/>")
    if reference is not None:
        y = plot.y(reference[0])
        parts.append(
            f"<line x1='{_LEFT}' x2='{width - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' "
            "stroke='#555' stroke-dasharray='4 3'/>"
            f"<text x='{width - _RIGHT - 3}' y='{y - 4:.1f}' text-anchor='end' class='t'>"
            f"{escape(reference[1])}</text>"
        )
    named = [line for line in drawn if line.label and not line.faint]
    if len(named) > 1:
        parts.append(_legend([(line.label, line.colour) for line in named], width))
    return _svg(parts, width, height)


def bar_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    width: int = 424,
    height: int = 230,
) -> Markup:
    """Shares between 0 and 1: {group: {series: share}}, one colour a series, values above bars."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not series:
        return Markup("")
    plot = _Axes(width, height, (0, len(groups)), (0, 1.0))
    parts = plot.frame(title, "", [], [0, 0.25, 0.5, 0.75, 1])
    slot = (width - _LEFT - _RIGHT) / len(groups)
    bar = min(0.8 * slot / len(series), 34)
    for number, (group, values) in enumerate(groups.items()):
        middle = _LEFT + (number + 0.5) * slot
        parts.append(
            f"<text x='{middle:.1f}' y='{height - 16}' text-anchor='middle' class='t'>"
            f"{escape(group)}</text>"
        )
        for place, name in enumerate(series):
            if name not in values:
                continue
            left = middle + (place - len(series) / 2) * bar
            top = plot.y(values[name])
            colour = COLOURS[place % len(COLOURS)]
            parts.append(
                f"<rect x='{left + 0.5:.1f}' y='{top:.1f}' width='{bar - 1:.1f}' "
                f"height='{plot.y(0) - top:.1f}' fill='{colour}'>"
                f"<title>{escape(group)}, {escape(name)}: {values[name]:.3f}</title></rect>"
            )
            if bar >= 15:
                parts.append(
                    f"<text x='{left + bar / 2:.1f}' y='{top - 3:.1f}' text-anchor='middle' "
                    f"class='v'>{_short(values[name])}</text>"
                )
    parts.append(_legend([(n, COLOURS[i % len(COLOURS)]) for i, n in enumerate(series)], width))
    return _svg(parts, width, height)


class _Axes:
    """Data coordinates to pixels."""

    def __init__(
        self, width: int, height: int, xs: tuple[float, float], ys: tuple[float, float]
    ) -> None:
        self.width, self.height, self.xs, self.ys = width, height, xs, ys

    def x(self, value: float) -> float:
        share = (value - self.xs[0]) / (self.xs[1] - self.xs[0])
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return self.height - _BOTTOM - share * (self.height - _TOP - 18 - _BOTTOM)

    def frame(
        self, title: str, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]
    ) -> list[str]:
        bottom, right = self.height - _BOTTOM, self.width - _RIGHT
        parts = [f"<text x='{_LEFT}' y='14' class='h'>{escape(title)}</text>"]
        for value in y_ticks:
            y = self.y(value)
            parts.append(
                f"<line x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}' stroke='#e3e3e0'/>"
                f"<text x='{_LEFT - 6}' y='{y + 3.5:.1f}' text-anchor='end' class='t'>"
                f"{_number(value)}</text>"
            )
        for value in x_ticks:
            parts.append(
                f"<text x='{self.x(value):.1f}' y='{bottom + 15}' text-anchor='middle' class='t'>"
                f"{_number(value)}</text>"
            )
        middle = (_LEFT + right) / 2
        parts.append(f"<line x1='{_LEFT}' x2='{right}' y1='{bottom}' y2='{bottom}' stroke='#888'/>")
        if x_label:
            parts.append(
                f"<text x='{middle:.0f}' y='{self.height - 4}' text-anchor='middle' class='t'>"
                f"{escape(x_label)}</text>"
            )
        return parts


def _legend(names: Sequence[tuple[str, str]], width: int) -> str:
    parts, x = [], float(width - _RIGHT)
    for label, colour in reversed(names):
        x -= 6.2 * len(label) + 22
        parts.append(
            f"<rect x='{x:.0f}' y='5' width='10' height='10' fill='{colour}'/>"
            f"<text x='{x + 14:.0f}' y='14' class='t'>{escape(label)}</text>"
        )
    return "".join(parts)


def _svg(parts: Sequence[str], width: int, height: int) -> Markup:
    body = "".join(parts)
    return Markup(
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>"
        f"{body}</svg>"
    )


def _number(value: float) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.01:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def _short(value: float) -> str:
    return "1" if value >= 0.995 else f"{value:.2f}".removeprefix("0")
