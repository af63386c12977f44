"""One row as its source's page shows it: pictures on their canvases, the chat, the lengths."""

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from conf.schema.data import DataConfig, SourceConfig
from data_shards import image_store
from data_shards.chat import ChatTokenizer
from data_shards.image_store import StoredImage
from data_shards.images import decode
from data_shards.layouts import to_fields
from data_shards.sample import IMAGE_MARK, Sample, SampleError, parse_sample
from data_shards.sources import SourceRow
from data_shards.variety import classify
from models.anyres import AnyresGeometry

_THUMBNAIL = 720  # px, longer side
_CANVAS, _TILE = 312, 156  # px on the page: longer side of a canvas, most of a tile
MOST_TEXT = 6000  # characters of one text; the page says how many are left out
MOST_PICTURES = 6  # of one sample


@dataclass(frozen=True)
class Picture:
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
class Turn:
    role: str
    trained: bool
    items: list[dict[str, Any]]  # {"image": number} or {"text": ..., "more": characters left out}


@dataclass(frozen=True)
class Shown:
    number: int
    origin: str
    layout: str
    licence: str
    variety: str
    pictures: list[Picture]
    pictures_left_out: int
    turns: list[Turn]
    tiles: int
    lengths: list[tuple[str, int, int]]  # (of what, tokens, of these trained on)
    rendered: list[list[tuple[str, bool]]]  # (text, is trained on) of each document


class Viewer:
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

    def look(self, row: SourceRow, draw: bool) -> Shown:
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
        return Shown(
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

    def _picture(self, number: int, image: StoredImage) -> Picture:
        geometry, height, width = self._geometry, image.height, image.width
        rows, columns = geometry.tile_grid(height, width)
        new_height, new_width, top, left = geometry.resize_box(height, width)
        tile, tiles = geometry.tile, geometry.n_tiles(height, width)
        tokens = geometry.n_tokens(height, width)
        return Picture(
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


def _turns(sample: Sample) -> list[Turn]:
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
        turns.append(Turn(message["role"], trained, items))
    for role, answer in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if answer is not None:
            turns.append(Turn(role, True, [_text(answer)]))
    return turns


def _text(text: str) -> dict[str, Any]:
    return {"text": text[:MOST_TEXT], "more": max(len(text) - MOST_TEXT, 0)}
