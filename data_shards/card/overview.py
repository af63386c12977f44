"""One page over all data sets of a configuration: ROOT/card.html, made of their card.parquet."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_shards.card import charts
from data_shards.card.long_form import FILE_NAME
from data_shards.card.render import COLOURS, ordered, render
from data_shards.durable import replacing
from data_shards.examined import writer

HTML = "card.html"


@dataclass(frozen=True)
class _Set:
    name: str
    counts: dict[str, float]
    metrics: dict[str, dict[str, float]]  # licence, language, variety -> label -> samples
    bar: str


def write_overview(root: Path, names: Iterable[str]) -> Path:
    """Write `root`/card.html over the data sets `names` that have a card; returns its path."""
    named = {name: root / name / FILE_NAME for name in names}
    sets = [_read(name, path) for name, path in named.items() if path.exists()]
    missing = [name for name, path in named.items() if not path.exists()]
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in sets:
        for metric, counted in {"count": one.counts, **one.metrics}.items():
            for label, value in counted.items():
                total[metric][label] += value
    page = render(
        "overview.html.jinja",
        sets=sets,
        missing=missing,
        total=total["count"],
        licences=_largest(total["licence"]),
        found_languages=_largest(total["language"]),
        varieties=ordered(total["variety"]),
        bar=_bar(total["variety"]),
    )
    path = root / HTML
    with replacing(path, writer()) as file:  # array tasks may end together
        file.write(page.encode("utf-8", "replace"))
    return path


def _read(name: str, path: Path) -> _Set:
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    wanted = [("metric", "in", ["count", "licence", "language", "variety"])]
    table = pq.read_table(path, columns=["metric", "label", "value"], filters=wanted)
    for row in table.to_pylist():
        metrics[row["metric"]][row["label"]] = row["value"]
    counts: dict[str, float] = defaultdict(float, metrics.pop("count", {}))
    return _Set(name, counts, dict(metrics), _bar(metrics.get("variety", {})))


def _bar(varieties: dict[str, float]) -> str:
    whole = {label: int(value) for label, value in ordered(varieties).items()}
    return charts.shares(whole, COLOURS, "varieties of Portuguese")


def _largest(counted: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))
