"""One source row to what its shard, the manifest and the search for duplicates need of it, or the
reason for refusing it.

A row is met twice: `examine` checks and measures everything; `members` makes the bytes of the shard
again, and compares them with what was examined.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

from conf.schema.data import ImageLimits, SourceConfig
from data_shards import jpeg_metadata, layouts, png_metadata
from data_shards.chat import ChatTokenizer
from data_shards.fingerprints import fingerprint
from data_shards.image_store import StoredImage, store
from data_shards.sample import Sample, SampleError, parse_sample
from data_shards.sources.rows import SourceRow
from data_shards.variety import Verdict
from data_shards.variety_judge import Judge
from models.anyres import AnyresGeometry

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in Pillow's messages; another one every time
# First bytes -> extension and what takes metadata out, without decoding.
_BARE: dict[bytes, tuple[str, Callable[[bytes], Any]]] = {
    b"\xff\xd8": ("jpg", jpeg_metadata.take_apart),
    b"\x89P": ("png", png_metadata.take_apart),
}


@dataclass(frozen=True)
class Settings:
    """What decides the content of a data set besides its rows."""

    name: str  # of the source
    source: SourceConfig
    limits: ImageLimits
    tokenizer: str  # directory
    geometry: AnyresGeometry
    variety_model: str | None = None


@dataclass(frozen=True)
class Examined:
    """A good sample: `row` has the columns of `examined.SCHEMA`."""

    number: int
    row: dict[str, Any]
    fingerprint: dict[str, Any]
    hits: Mapping[str, int]  # rule of the variety classifier -> how often it hit


@dataclass(frozen=True)
class Refused:
    """A bad sample, for the quarantine."""

    number: int
    key: str
    origin: str
    reason: str


@dataclass(frozen=True)
class Content:
    """One member of a shard: `extension` such as json or 0.jpg."""

    extension: str
    data: bytes
    sha256: bytes


class SourceChanged(ValueError):
    """A row is not what it was when it was examined."""


def key_of(number: int) -> str:
    """Key of the sample of row `number`."""
    return f"{number:09d}"


class _State:
    """A row on its way through the checks, each of which sets what it finds."""

    sample: Sample
    images: list[StoredImage]
    sizes: list[tuple[int, int]]  # tiles and tokens of each image
    lengths: dict[str, int]
    verdict: Verdict

    def __init__(self, row: SourceRow):
        self.row = row
        self.reason: str | None = None  # for refusing it


class Preparer:
    """Prepares the rows of one source."""

    def __init__(self, settings: Settings, tokenizer: ChatTokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._judge = Judge(settings.variety_model)
        geometry = settings.geometry
        # Pictures of a source have few sizes, and each would try every canvas.
        self._tiles_and_tokens = lru_cache(maxsize=65536)(
            lambda height, width: (
                geometry.n_tiles(height, width),
                geometry.n_tokens(height, width),
            )
        )

    @property
    def limits(self) -> ImageLimits:
        """What an image may be."""
        return self._settings.limits

    def examine(self, row: SourceRow) -> Examined | Refused:
        """Check everything about one row."""
        return self.examine_all([row])[0]

    def examine_all(self, rows: Sequence[SourceRow]) -> list[Examined | Refused]:
        """As `examine`, of several rows, in their order.

        One check after the other for all of them: a quarter faster than row by row, since each
        check finds its tables in the processor's caches.
        """
        states = [_State(row) for row in rows]
        for check in (self._parse, self._images, self._count_tokens, self._verdict):
            for state in states:
                if state.reason is None:
                    try:
                        check(state)
                    except ValueError as error:
                        state.reason = _ADDRESS.sub("", " ".join(str(error).split()))
        return [self._result(state) for state in states]

    def members(self, row: SourceRow, examined: Mapping[str, Any]) -> list[Content]:
        """The record and the images of a row that was examined: byte for byte the same.

        Raises:
            SourceChanged: they are not; names the row.
        """
        try:
            sample = self._sample(row)
            if len(sample.images) != len(examined["images"]):
                raise SampleError("it has another number of images")
            record = sample.to_json()
            contents = [Content("json", record, sha256(record).digest())]
            if contents[0].sha256 != examined["json_sha256"]:
                raise SampleError("its text differs")
            for number, (data, facts) in enumerate(
                zip(sample.images, examined["images"], strict=True)
            ):
                stored = self._again(data, facts, number)
                extension = f"{number}.{facts['extension']}"
                contents.append(Content(extension, stored, facts["sha256"]))
        except SampleError as error:
            raise SourceChanged(
                f"{self._settings.name}: row {row.origin} is no longer what was examined "
                f"({error}): its file, or an image that it names, was changed meanwhile; when that "
                "is over, touch the source file and give the same command again"
            ) from None
        return contents

    def _again(self, data: bytes, facts: Mapping[str, Any], number: int) -> bytes:
        """The stored form of an image whose every bit was checked when it was examined."""
        if sha256(data).digest() == facts["sha256"]:
            return data
        take_apart = _BARE.get(data[:2])
        try:
            if take_apart is not None and facts["extension"] == take_apart[0]:
                bare = take_apart[1](data).bare
                if sha256(bare).digest() == facts["sha256"]:
                    return bare
        except ValueError:
            pass  # what it is not then, is said below
        stored = _stored(data, number, self._settings.limits)
        if stored.sha256 != facts["sha256"]:
            raise SampleError(f"image {number} differs")
        return stored.data

    def _sample(self, row: SourceRow) -> Sample:
        settings = self._settings
        if row.problem is not None:
            raise SampleError(row.problem)
        fields = layouts.to_fields(row, settings.source)
        return parse_sample(
            {"messages": fields.messages, "chosen": fields.chosen, "rejected": fields.rejected},
            fields.images,
            key=key_of(row.number),
            source=settings.name,
            licence=fields.licence,
            origin=row.origin,
            preference=settings.source.preference,
        )

    def _parse(self, state: "_State") -> None:
        state.sample = self._sample(state.row)

    def _images(self, state: "_State") -> None:
        images, limits = state.sample.images, self._settings.limits
        state.images = [_stored(data, n, limits) for n, data in enumerate(images)]
        for image in state.images:
            image.sha256  # noqa: B018 - computed while the bytes are near

    def _count_tokens(self, state: "_State") -> None:
        state.sizes = [self._tiles_and_tokens(image.height, image.width) for image in state.images]
        state.lengths = self._lengths(state.sample, [tokens for _, tokens in state.sizes])

    def _verdict(self, state: "_State") -> None:
        sample = state.sample
        state.verdict = self._judge("\n".join(sample.answers()[: 1 if sample.is_pair else None]))

    def _result(self, state: "_State") -> Examined | Refused:
        row = state.row
        if state.reason is not None:
            return Refused(row.number, key_of(row.number), row.origin, state.reason)
        sample, record = state.sample, state.sample.to_json()
        values = {
            "number": row.number,
            "origin": row.origin,
            "json_size": len(record),
            "json_sha256": sha256(record).digest(),
            "images": [
                {
                    "size": len(image.data),
                    "sha256": image.sha256,
                    "width": image.width,
                    "height": image.height,
                    "tiles": tiles,
                    "extension": image.extension,
                }
                for image, (tiles, _) in zip(state.images, state.sizes, strict=True)
            ],
            **state.lengths,
            "tiles": sum(tiles for tiles, _ in state.sizes),
            "variety": state.verdict.label,
            "language": state.verdict.language,
            "source": sample.source,
            "licence": sample.licence,
        }
        prints = fingerprint(sample, state.images)
        return Examined(row.number, values, prints, state.verdict.hits)

    def _lengths(self, sample: Sample, image_tokens: Sequence[int]) -> dict[str, int]:
        if sample.chosen is None or sample.rejected is None:
            lengths = (*self._tokenizer.count(sample.messages, image_tokens), 0, 0)
        else:
            chosen, rejected = self._tokenizer.count_preference(
                sample.messages, sample.chosen, sample.rejected, image_tokens
            )
            lengths = (*chosen, *rejected)
        names = ("tokens", "target_tokens", "tokens_rejected", "target_tokens_rejected")
        return dict(zip(names, lengths, strict=True))


def _stored(data: bytes, number: int, limits: ImageLimits) -> StoredImage:
    try:
        return store(data, limits)
    except ValueError as error:
        raise SampleError(f"image {number}: {error}") from None
