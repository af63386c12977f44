"""What a part found: tables on disk after every row, so that a kill loses nothing before it."""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.durable import replacing
from tools.benchmarks.table import Cell, rows_as_markdown

RUNNING, OK, FAILED, LATE, SKIPPED = "running", "ok", "failed", "out of time", "skipped"


@dataclass
class Table:
    """One table of a part."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass
class Report:
    """The tables of one part, `path` being rewritten (aside, renamed) with each row."""

    part: str
    path: Path
    status: str = RUNNING
    seconds: float = 0.0
    error: str = ""
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str]) -> Table:
        """Begin another table."""
        self.tables.append(Table(title, list(columns)))
        return self.tables[-1]

    def row(self, table: Table, *cells: Cell) -> None:
        """Add a row, print it, and write the file."""
        assert len(cells) == len(table.columns)
        table.rows.append(list(cells))
        print(f"[{self.part}] " + "  ".join(map(str, cells)), flush=True)
        self.write()

    def note(self, text: str) -> None:
        """A sentence below the tables."""
        self.notes.append(text)
        print(f"[{self.part}] {text}", flush=True)
        self.write()

    def attempt(self, what: str, function: Callable[[], None]) -> bool:
        """Run one item of a part; a failure becomes a note and the next item runs."""
        try:
            function()
            return True
        except Exception as error:
            self.note(f"{what} failed: {one_line(error)}")
            self.data.setdefault("tracebacks", {})[what] = traceback.format_exc(limit=-12)
            self.status = FAILED
            self.write()
            return False

    def write(self) -> None:
        """All of it as JSON."""
        with replacing(self.path) as file:
            file.write((json.dumps({**asdict(self), "path": ""}, indent=1) + "\n").encode())


def one_line(error: BaseException, most: int = 240) -> str:
    """Kind and message of an error, cut."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def read_report(path: Path, part: str) -> Report:
    """What is on disk of a part; a failed one where there is nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        value["tables"] = [Table(**table) for table in value["tables"]]
        value["path"] = path
        return Report(**value)
    except (OSError, ValueError, TypeError, KeyError):
        return Report(part, path, status=FAILED, error="it wrote nothing")


def as_text(reports: Sequence[Report], header: str) -> str:
    """All tables as Markdown, the parts' outcomes last."""
    parts = [header.strip()]
    for report in reports:
        parts.append(f"## {report.part}: {report.status}, {report.seconds:.0f} s")
        for table in report.tables:
            parts.append(f"### {table.title}\n\n" + rows_as_markdown(table.columns, table.rows))
        if report.error:
            parts.append(f"Error: {report.error}")
        if report.notes:
            parts.append("\n".join(f"- {note}" for note in report.notes))
    summary: list[list[Cell]] = [
        [r.part, r.status, round(r.seconds), len(r.notes)] for r in reports
    ]
    parts.append("## Outcome\n\n" + rows_as_markdown(["part", "status", "s", "notes"], summary))
    return "\n\n".join(parts) + "\n"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._begun
