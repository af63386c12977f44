"""Templates of this folder to pages: what stands in them is escaped, the charts alone are not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from data_shards.variety_rules.load import PT_BR, PT_PT

COLOURS = {PT_PT: "#2f8f4e", PT_BR: "#e0a021", "undecided": "#b9c1cd", "other": "#7a86a0"}
LANGUAGES = {
    "pt": "Portuguese",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "other": "another",
    "undecided": "undecided (too short)",
    "none": "none (numbers, formulas, code)",
}
_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["count"] = lambda number: f"{number:,.0f}"
    environment.filters["bytes"] = _bytes
    environment.filters["percent"] = _percent
    style = (_FOLDER / "card.css").read_text(encoding="utf-8")
    page = environment.from_string((_FOLDER / template).read_text(encoding="utf-8"))
    return page.render(style=style, colours=COLOURS, languages=LANGUAGES, **values)


def ordered(varieties: Mapping[str, Any]) -> dict[str, Any]:
    """The labels in the order in which they are shown."""
    labels = [label for label in COLOURS if label in varieties]
    labels += sorted(set(varieties) - set(COLOURS))
    return {label: varieties[label] for label in labels}


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{number:.0f}\N{NO-BREAK SPACE}bytes"


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    small = 0 < share < 9.95
    text = "<0.1" if 0 < share < 0.05 else f"{share:.1f}" if small else f"{share:.0f}"
    return f"{text}\N{NO-BREAK SPACE}%"
