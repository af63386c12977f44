"""A page that shows what a source will become, before anything is built (make shards DRY=1).

One HTML file without scripts and without anything from outside: samples with their pictures as they
will be tiled and their chats as they will be tokenised, how the columns were understood, and the
reasons for refusing rows. Rows are looked at in up to `samples` places all over the source.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ModelConfig
from data_shards.chat import ChatTokenizer, TokenizerError
from data_shards.durable import replacing
from data_shards.layout_columns import LayoutError, Rules, find
from data_shards.preview_sample import Shown, Viewer
from data_shards.sources import Source, SourceRow, open_source
from models.anyres import AnyresGeometry

LOOKED_AT = 10  # rows for each sample that is shown
_BLOCK_ROWS = 1000
_TEMPLATE = Path(__file__).with_name("preview.html.jinja")


@dataclass
class _Findings:
    shown: list[Shown] = field(default_factory=list)
    refused: list[tuple[int, str, str]] = field(default_factory=list)  # number, origin, reason
    looked_at: int = 0
    layouts: dict[str, int] = field(default_factory=dict)
    columns: list[tuple[str, str]] = field(default_factory=list)  # (our field, their column)
    unused: list[str] = field(default_factory=list)


def write_preview(
    name: str,
    source: SourceConfig,
    data: DataConfig,
    model: ModelConfig,
    out: Path,
    samples: int = 10,
) -> Path:
    """Write `out`/`name`.html (the directory is made) and return its path.

    Without a tokenizer in `data.tokenizer`, which `make import` writes, text tokens are not
    counted; the page says so.

    Raises:
        SourceError: the source cannot be read at all.
    """
    opened = open_source(name, source)
    geometry = AnyresGeometry.from_model(model)
    tokenizer, missing = _tokenizer(data)
    blocks = opened.blocks(_BLOCK_ROWS)
    found = _look(Viewer(name, source, data, geometry, tokenizer), opened, samples)
    most_tiles = max(height * width for height, width in geometry.pinpoints) // geometry.tile**2
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        source=source,
        files=len(opened.files),
        first_file=str(opened.files[0]),
        rows=sum(block.rows for block in blocks),
        geometry=geometry,
        most_tiles=1 + most_tiles,
        tokenizer=data.tokenizer,
        missing=missing,
        found=found,
        limits=data.images,
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.html"
    with replacing(path) as file:
        # Text that was refused may hold what UTF-8 cannot.
        file.write(page.encode("utf-8", "replace"))
    return path


def _tokenizer(data: DataConfig) -> tuple[ChatTokenizer | None, str]:
    try:
        return ChatTokenizer.from_directory(data.tokenizer), ""
    except (TokenizerError, OSError) as error:
        return None, " ".join(str(error).split())


def _rows(source: Source, samples: int) -> Iterator[tuple[int, SourceRow]]:
    """(place, row): from the beginnings of blocks all over the source, alike each time."""
    blocks = source.blocks(_BLOCK_ROWS)
    places = min(len(blocks), samples)
    each = math.ceil(samples * LOOKED_AT / max(places, 1))
    for place in range(places):
        block = blocks[place * len(blocks) // places]
        # Neighbours are alike; a few more rows cost little.
        stride = min(LOOKED_AT, max(block.rows // each, 1))
        for row in islice(source.rows(block), 0, each * stride, stride):
            yield place, row


def _look(viewer: Viewer, source: Source, samples: int) -> _Findings:
    found = _Findings()
    places = max(min(len(source.blocks(_BLOCK_ROWS)), samples), 1)
    for place, row in _rows(source, samples):
        found.looked_at += 1
        if not found.columns and row.values:
            found.columns, found.unused = _columns(source, row)
        try:
            # As many from each place, but all of those that the places before did not have.
            wanted = len(found.shown) < math.ceil(samples * (place + 1) / places)
            shown = viewer.look(row, wanted)
        except ValueError as error:
            found.refused.append((row.number, row.origin, " ".join(str(error).split())))
            continue
        found.layouts[shown.layout] = found.layouts.get(shown.layout, 0) + 1
        if wanted:
            found.shown.append(shown)
    return found


def _columns(source: Source, row: SourceRow) -> tuple[list[tuple[str, str]], list[str]]:
    """(our field, their column) of those in use, and the other columns."""
    try:
        rules = Rules.of(source.config)
        columns = find(row.values.keys(), rules, whole=False, beside=bool(row.attached))
    except LayoutError:
        return [], sorted(row.values)
    wanted = _fields(columns.layout, source.config.preference)
    used = [(ours, theirs) for ours, theirs in columns.of.items() if ours in wanted]
    if row.attached:
        used.append(("images", "members beside the record"))
    taken = {theirs.partition(".")[0] for _, theirs in used} | {theirs for _, theirs in used}
    names = source.column_names(row)
    return sorted(used), [name for name in names if name not in taken]


def _fields(layout: str, preference: bool) -> set[str]:
    own = {"caption": {"caption"}, "question": {"question", "answer"}}.get(layout, {"messages"})
    pair = {"chosen", "rejected"} if preference else set()
    return (own - {"answer"} if preference else own) | pair | {"images", "licence"}
