"""A page that shows what a source will become, before anything is built (make shards DRY=1).

One HTML file without scripts and without anything from outside: samples with their pictures as they
will be tiled and their chats as they will be tokenised, how the columns were understood, and the
reasons for refusing rows. Rows are looked at in up to `samples` places all over the source.
"""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ModelConfig
from data_shards import image_store
from data_shards.chat import ChatTokenizer, TokenizerError
from data_shards.durable import replacing
from data_shards.image_store import StoredImage
from data_shards.images import decode
from data_shards.layout_columns import LayoutError, Rules, find
from data_shards.layouts import to_fields
from data_shards.sample import IMAGE_MARK, Sample, SampleError, parse_sample
from data_shards.sources import Source, SourceRow, open_source
from data_shards.variety import classify
from models.anyres import AnyresGeometry

LOOKED_AT = 10  # rows for each sample that is shown
_BLOCK_ROWS = 1000
_THUMBNAIL = 720  # px, longer side
_CANVAS, _TILE = 312, 156  # px on the page: longer side of a canvas, most of a tile
MOST_TEXT = 6000  # characters of one text; the page says how many are left out
MOST_PICTURES = 6  # of one sample
_TEMPLATE = Path(__file__).with_name("preview.html.jinja")


@dataclass(frozen=True)
class _Picture:
    """One image on its canvas; lengths in the model's pixels, `scale` of them on the page."""

    number: int
    url: str
    about: str
    tile: int
    rows: int
    columns: int
    box: tuple[int, int, int, int]  # x, y, width, height of the image on the canvas
    scale: float
    tiles: int
    tokens: int


@dataclass(frozen=True)
class _Turn:
    role: str
    trained: bool
    items: list[dict[str, Any]]  # {"image": number} or {"text": ..., "more": characters left out}


@dataclass(frozen=True)
class _Shown:
    number: int
    origin: str
    layout: str
    licence: str
    variety: str
    pictures: list[_Picture]
    pictures_left_out: int
    turns: list[_Turn]
    tiles: int
    lengths: list[tuple[str, int, int]]  # (of what, tokens, of these trained on)
    rendered: list[list[tuple[str, bool]]]  # (text, is trained on) of each document


@dataclass
class _Findings:
    shown: list[_Shown] = field(default_factory=list)
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
    found = _look(_Viewer(name, source, data, geometry, tokenizer), opened, samples)
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


def _look(viewer: "_Viewer", source: Source, samples: int) -> _Findings:
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
    wanted = _fields(columns.layout)
    used = [(ours, theirs) for ours, theirs in columns.of.items() if ours in wanted]
    if row.attached:
        used.append(("images", "members beside the record"))
    taken = {theirs.partition(".")[0] for _, theirs in used} | {theirs for _, theirs in used}
    names = source.column_names(row)
    return sorted(used), [name for name in names if name not in taken]


def _fields(layout: str) -> set[str]:
    own = {"caption": {"caption"}, "question": {"question", "answer"}}.get(layout, {"messages"})
    return own | {"images", "chosen", "rejected", "licence"}


class _Viewer:
    """Turns rows into what the page shows of them."""

    def __init__(
        self,
        name: str,
        source: SourceConfig,
        data: DataConfig,
        geometry: AnyresGeometry,
        tokenizer: ChatTokenizer | None,
    ) -> None:
        self._name, self._source, self._limits = name, source, data.images
        self._geometry, self._tokenizer = geometry, tokenizer

    def look(self, row: SourceRow, draw: bool) -> _Shown:
        """Check a row as the builder does; its pictures only where `draw`.

        Raises:
            ValueError: why the row would be refused.
        """
        fields = to_fields(row, self._source)
        sample = parse_sample(
            {"messages": fields.messages, "chosen": fields.chosen, "rejected": fields.rejected},
            fields.images,
            key=f"{row.number:09d}",
            source=self._name,
            licence=fields.licence,
            origin=row.origin,
            preference=self._source.preference,
        )
        stored = []
        for number, content in enumerate(sample.images):
            try:
                stored.append(image_store.store(content, self._limits))
            except ValueError as error:
                raise SampleError(f"image {number}: {error}") from None
        image_tokens = [self._geometry.n_tokens(image.height, image.width) for image in stored]
        lengths = self._lengths(sample, image_tokens)
        pictures = list(map(self._picture, range(len(stored)), stored)) if draw else []
        rendered = self._rendered(sample) if draw else []
        return _Shown(
            row.number,
            row.origin,
            fields.layout,
            sample.licence,
            classify("\n".join(sample.answers()[: 1 if sample.is_pair else None])).label,
            pictures[:MOST_PICTURES],
            len(pictures[MOST_PICTURES:]),
            _turns(sample),
            sum(self._geometry.n_tiles(image.height, image.width) for image in stored),
            lengths,
            rendered,
        )

    def _rendered(self, sample: Sample) -> list[list[tuple[str, bool]]]:
        if self._tokenizer is None:
            return []
        answers = [sample.chosen, sample.rejected] if sample.is_pair else [None]
        documents = [self._tokenizer.rendered(sample.messages, answer) for answer in answers]
        return [[(text[:MOST_TEXT], trained) for text, trained in parts] for parts in documents]

    def _lengths(self, sample: Sample, image_tokens: list[int]) -> list[tuple[str, int, int]]:
        """(of what, tokens, of these trained on); empty without a tokenizer."""
        if self._tokenizer is None:
            return []
        if sample.chosen is None or sample.rejected is None:
            one = self._tokenizer.encode(sample.messages, image_tokens)
            return [("", len(one.ids), one.n_targets)]
        pair = self._tokenizer.encode_preference(
            sample.messages, sample.chosen, sample.rejected, image_tokens
        )
        names = ("chosen", "rejected")
        return [(n, len(e.ids), e.n_targets) for n, e in zip(names, pair, strict=True)]

    def _picture(self, number: int, image: StoredImage) -> _Picture:
        geometry, height, width = self._geometry, image.height, image.width
        rows, columns = geometry.tile_grid(height, width)
        new_height, new_width, top, left = geometry.resize_box(height, width)
        tile, tiles = geometry.tile, geometry.n_tiles(height, width)
        tokens = geometry.n_tokens(height, width)
        return _Picture(
            number,
            _thumbnail(image, self._limits.max_pixels),
            f"{width}\N{MULTIPLICATION SIGN}{height} px, {len(image.data) / 1000:,.0f} kB "
            f"{image.extension}",
            tile,
            rows,
            columns,
            (left, top, new_width, new_height),
            min(_CANVAS / max(rows, columns), _TILE) / tile,
            tiles,
            tokens,
        )


def _thumbnail(image: StoredImage, max_pixels: int) -> str:
    """A small JPEG of the stored image, as a data URL."""
    picture = decode(image.data, max_pixels)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _turns(sample: Sample) -> list[_Turn]:
    turns, images = [], 0
    for message in sample.messages:
        content, items = message["content"], []
        marked = isinstance(content, str) and message["role"] == "user"
        parts = content.split(IMAGE_MARK) if marked else [content]
        if isinstance(content, str):
            content = []
            for number, part in enumerate(parts):
                content += [{"type": "image"}] * (number > 0)
                content += [{"type": "text", "text": part}] if part.strip() else []
        for item in content:
            if item["type"] == "image":
                items.append({"image": images})
                images += 1
            else:
                items.append(_text(item["text"]))
        trained = message["role"] == "assistant" and not sample.is_pair
        turns.append(_Turn(message["role"], trained, items))
    for role, answer in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if answer is not None:
            turns.append(_Turn(role, True, [_text(answer)]))
    return turns


def _text(text: str) -> dict[str, Any]:
    return {"text": text[:MOST_TEXT], "more": max(len(text) - MOST_TEXT, 0)}
