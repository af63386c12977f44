"""Sections of a benchmark page: one JSON file, and the Markdown made from it.

A section is measured and replaced alone; the others keep their own date, commit and hardware.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.durable import replacing

Cell = str | float | int | None


@dataclass
class Section:
    """One table with what belongs to it."""

    title: str
    method: str  # prose: what was compared, what is included
    columns: list[str]
    rows: list[list[Cell]]
    facts: dict[str, Any]  # of tools.benchmarks.machine.facts
    notes: list[str] = field(default_factory=list)  # below the table; warnings first
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # every single figure, JSON only


def number(value: Cell) -> str:
    """Three significant digits, thousands apart; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", " ")
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def rows_as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table, without a line feed at its end."""
    lines = [columns, ["---"] * len(columns), *([number(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_markdown(section: Section) -> str:
    """A chapter of the page."""
    facts = section.facts
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    where = [facts["date"], f"commit {facts['commit']}", facts["hardware"], packages]
    parts = [f"## {section.title}", section.method.strip()]
    parts += [rows_as_markdown(section.columns, section.rows)]
    if section.notes:
        parts.append("\n".join(f"- {note}" for note in section.notes))
    if section.settings:
        parts.append(
            "Settings: " + ", ".join(f"{k}={v}" for k, v in section.settings.items()) + "."
        )
    parts.append("; ".join(where) + f"; `{facts['command']}`.")
    return "\n\n".join(parts) + "\n"


@dataclass
class Page:
    """`NAME.md` and `NAME.json` of a directory."""

    directory: Path
    name: str
    heading: str  # Markdown above the sections
    order: Sequence[str]  # keys of the sections, as they shall stand

    @property
    def json_path(self) -> Path:
        return self.directory / f"{self.name}.json"

    def sections(self) -> dict[str, Section]:
        """What was measured before.

        Raises:
            ValueError: the file is damaged; it names the remedy.
        """
        if not self.json_path.is_file():
            return {}
        try:
            stored = json.loads(self.json_path.read_text(encoding="utf-8"))
            return {key: Section(**value) for key, value in stored["sections"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.json_path} is damaged ({error}); remove it and measure again"
            ) from None

    def write(self, new: Mapping[str, Section]) -> None:
        """Replace these sections and write both files, each aside and renamed."""
        merged = {**self.sections(), **new}
        ordered = {key: merged[key] for key in self.order if key in merged}
        self.directory.mkdir(parents=True, exist_ok=True)
        stored = {"sections": {key: asdict(section) for key, section in ordered.items()}}
        with replacing(self.json_path) as file:
            file.write((json.dumps(stored, indent=1, ensure_ascii=False) + "\n").encode())
        text = "\n".join([self.heading.strip() + "\n", *map(as_markdown, ordered.values())])
        with replacing(self.directory / f"{self.name}.md") as file:
            file.write(text.encode())
