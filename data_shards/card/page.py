"""The data card of one data set: card.html, which needs nothing else, and card.parquet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.card import charts
from data_shards.card.figures import SIDE_STEPS, Figures, quantile, read_figures
from data_shards.card.long_form import FILE_NAME, write_long_form
from data_shards.card.render import COLOURS, ordered, render
from data_shards.card.samples import SampleReader
from data_shards.durable import replacing
from data_shards.manifest import read_manifest
from data_shards.variety_judge import AGREEMENT, MODEL
from data_shards.variety_rules.load import PT_BR, PT_PT, rules

HTML = "card.html"
MOST_RULES = 15  # of each variety
MOST_REASONS = 40


def write_card(folder: Path, name: str) -> None:
    """Write card.html and card.parquet of the data set `name` into its `folder`.

    Raises:
        ManifestError: the manifest there cannot be read.
    """
    figures = read_figures(folder, name)
    manifest = read_manifest(folder / "manifest.parquet")
    reader = SampleReader(manifest)
    try:
        turns, unreadable = reader.turns()
        shown = reader.shown()
    finally:
        reader.close()
    page = render(
        "card.html.jinja",
        figures=figures,
        info=figures.info,
        total=figures.total,
        tokens_median=quantile(figures.tokens, 0.5),
        tokens_most=quantile(figures.tokens, 1.0),
        charts=_charts(figures, turns),
        varieties=ordered(figures.info.varieties),
        rules=_top_rules(figures.hits),
        model=_counts(figures.hits, MODEL),
        agreement=_counts(figures.hits, AGREEMENT),
        refused=_largest(figures.refused),
        duplicates=_largest(figures.duplicates),
        most_reasons=MOST_REASONS,
        turns_of=sum(turns.values()),
        unreadable=unreadable,
        shown=shown,
    )
    with replacing(folder / HTML) as file:
        file.write(page.encode("utf-8", "replace"))
    write_long_form(folder / FILE_NAME, figures)


def _charts(figures: Figures, turns: Mapping[int, int]) -> dict[str, str]:
    few = _few(figures.tiles)
    tiles = few or charts.equal_bins(figures.tiles)
    answers = [(str(n), turns.get(n, 0)) for n in range(min(turns, default=0), 13) if turns]
    more = sum(count for n, count in turns.items() if n > 12)
    answers = _trimmed([*answers, ("13+", more)])
    images = _trimmed([(str(n), int(c)) for n, c in enumerate(figures.images[:8])])
    images += [("8+", int(figures.images[8]))] if figures.images[8] else []
    return {
        "tokens": charts.columns(
            *charts.equal_bins(figures.tokens), "tokens of a document", bins=True
        ),
        "tiles": charts.columns(*tiles, "tiles of a sample", bins=few is None),
        "turns": charts.columns(*_pairs(answers), "answers of a sample"),
        "images": charts.columns(*_pairs(images), "images of a sample"),
        "sizes": charts.table_of_sizes(figures.sides, SIDE_STEPS, "width and height of images"),
        "varieties": charts.shares(
            ordered(figures.info.varieties), COLOURS, "varieties of Portuguese"
        ),
    }


def _few(counts: Any) -> tuple[list[str], list[int]] | None:
    """A column for each number, or None where that were too many."""
    used = counts.nonzero()[0]
    if not len(used) or used[-1] > 32:
        return None
    values = range(int(used[0]), int(used[-1]) + 1)
    return [str(value) for value in values], [int(counts[value]) for value in values]


def _trimmed(pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    while pairs and not pairs[-1][1]:
        pairs = pairs[:-1]
    return pairs


def _pairs(pairs: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [label for label, _ in pairs], [count for _, count in pairs]


def _largest(reasons: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    return sorted(reasons.items(), key=lambda pair: (-pair[1].count, pair[0]))


def _counts(hits: Mapping[str, int], prefix: str) -> dict[str, int]:
    found = {key[len(prefix) :]: n for key, n in hits.items() if key.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def _top_rules(hits: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Variety -> its rules with the most hits."""
    known = {rule.id: rule for rule in rules()}
    top: dict[str, list[dict[str, Any]]] = {PT_PT: [], PT_BR: []}
    most = max((hits[name] for name in hits if name in known), default=1)
    for name, times in sorted(hits.items(), key=lambda pair: (-pair[1], pair[0])):
        if name in known and len(top[known[name].variety]) < MOST_RULES:
            rule = known[name]
            row = {"id": name, "times": times, "share": times / most, "category": rule.category}
            top[rule.variety].append(row)
    return top
