"""The figures of a data card, read in one pass and bounded memory from what a build leaves behind.

Of manifest.parquet only the columns that are counted are read, batch by batch; of the reasons in
the quarantine only kinds are kept, the digits taken out. So memory does not grow with the samples.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.manifest import FILE_NAME, ManifestInfo, read_manifest

_BATCH = 1 << 16  # rows
MOST_TOKENS, MOST_TILES = 1 << 17, 1 << 10  # longer counts are counted there
_MOST_REASONS = 1000  # kinds; more are "other reasons"
_COLUMNS = ["tokens", "tokens_rejected", "target_tokens", "target_tokens_rejected", "tiles"]
_COLUMNS += ["images.list.element.size", "images.list.element.width", "images.list.element.height"]
SIDE_STEPS = 2  # columns of the table of image sizes to a doubling
SIDES = 26  # columns; the last is 2^(25/2), about 5,800 px, and more
# As data_shards/duplicates.py words it.
_SAME = re.compile(
    r"(?:an? duplicate: )?(.+?)(?: (?:as|to|to those of))?( evaluation set:)? row \d+ of (.+)"
)


@dataclass
class Reason:
    """Samples left out for one kind of reason."""

    count: int = 0
    origin: str = ""  # of the first
    example: str = ""  # its reason, in full


@dataclass
class Figures:
    """All that a card shows of one data set but its sample pictures."""

    name: str
    info: ManifestInfo
    samples: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(MOST_TOKENS + 1, np.int64))
    tiles: np.ndarray = field(default_factory=lambda: np.zeros(MOST_TILES + 1, np.int64))
    images: np.ndarray = field(
        default_factory=lambda: np.zeros(9, np.int64)
    )  # of a sample; 8: more
    sides: np.ndarray = field(default_factory=lambda: np.zeros((SIDES, SIDES), np.int64))
    total: Counter[str] = field(default_factory=Counter)
    largest: tuple[int, int] = (0, 0)  # width, height of the image with the most pixels
    smallest: tuple[int, int] = (0, 0)
    refused: dict[str, Reason] = field(default_factory=dict)
    duplicates: dict[tuple[str, str], Reason] = field(default_factory=dict)  # (kind, against)
    hits: dict[str, int] = field(default_factory=dict)

    @property
    def n_refused(self) -> int:
        return sum(reason.count for reason in self.refused.values())

    @property
    def n_duplicates(self) -> int:
        return sum(reason.count for reason in self.duplicates.values())

    @property
    def rows_read(self) -> int:
        """Rows of the source; none is without a place among samples, refused and duplicates."""
        return self.samples + self.n_refused + self.n_duplicates


def read_figures(folder: Path, name: str) -> Figures:
    """The figures of the data set in `folder` (finished, or about to be).

    Raises:
        ManifestError: its manifest cannot be read.
    """
    path = folder / FILE_NAME
    figures = Figures(name, read_manifest(path).info)
    figures.total["bytes"] = sum(shard.size for shard in figures.info.shards)
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH, columns=_COLUMNS):
            _add_rows(figures, batch)
    for entry in _entries(folder / "quarantine" / "reasons.jsonl"):
        _add_reason(figures, entry)
    figures.hits = _hits(folder / "hits.json")
    return figures


def quantile(counts: np.ndarray, share: float) -> int:
    """The value at or under which `share` of the counted things are; counts[v] have the value v."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, share * ends[-1])) if len(ends) and ends[-1] else 0


def _add_rows(figures: Figures, batch: pa.RecordBatch) -> None:
    numbers = {name: batch.column(name).to_numpy() for name in _COLUMNS[:5]}
    figures.samples += len(batch)
    for name, values in numbers.items():
        figures.total[name] += int(values.sum(dtype=np.int64))
    # A pair is two documents.
    lengths = [numbers["tokens"], numbers["tokens_rejected"][numbers["tokens_rejected"] > 0]]
    figures.tokens += _counted(np.concatenate(lengths), MOST_TOKENS)
    figures.tiles += _counted(numbers["tiles"], MOST_TILES)
    images = batch.column("images")
    figures.images += _counted(np.asarray(images.value_lengths()), 8)
    flat = images.flatten()
    if len(flat):
        widths, heights = (flat.field(side).to_numpy() for side in ("width", "height"))
        figures.total["images"] += len(flat)
        figures.total["image_bytes"] += int(flat.field("size").to_numpy().sum(dtype=np.int64))
        np.add.at(figures.sides, (_step(heights), _step(widths)), 1)
        _extremes(figures, widths.astype(np.int64), heights.astype(np.int64))


def _counted(values: np.ndarray, most: int) -> np.ndarray:
    return np.bincount(np.clip(values, 0, most), minlength=most + 1)


def _step(sides: np.ndarray) -> np.ndarray:
    """Column of a side in the table of image sizes."""
    steps = np.floor(SIDE_STEPS * np.log2(np.maximum(sides, 1))).astype(np.int64)
    return np.minimum(steps, SIDES - 1)


def _extremes(figures: Figures, widths: np.ndarray, heights: np.ndarray) -> None:
    pixels = widths * heights
    most, least = int(pixels.argmax()), int(pixels.argmin())
    if pixels[most] > figures.largest[0] * figures.largest[1]:
        figures.largest = int(widths[most]), int(heights[most])
    if figures.smallest == (0, 0) or pixels[least] < figures.smallest[0] * figures.smallest[1]:
        figures.smallest = int(widths[least]), int(heights[least])


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def _add_reason(figures: Figures, entry: dict[str, Any]) -> None:
    text = str(entry["reason"])
    if entry.get("kind") == "duplicate":
        match = _SAME.fullmatch(text)
        kind, test, against = match.groups() if match else (text, "", "")
        key = (kind, f"{against} (evaluation)" if test else against)
        reason = figures.duplicates.setdefault(key, Reason())
    else:
        kind = re.sub(r"\d[\d.,]*", "…", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", text))
        if kind not in figures.refused and len(figures.refused) >= _MOST_REASONS:
            kind = "other reasons"
        reason = figures.refused.setdefault(kind, Reason())
    if not reason.count:
        reason.origin, reason.example = str(entry["origin"]), text
    reason.count += 1


def _hits(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    return {str(rule): int(times) for rule, times in json.loads(path.read_bytes()).items()}
