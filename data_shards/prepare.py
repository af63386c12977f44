"""One source row to what the shard and the manifest need of it, or the reason for refusing it."""

from dataclasses import dataclass
from typing import Any

from conf.schema.data import ImageLimits
from data_shards.chat import ChatTokenizer
from data_shards.image_store import StoredImage, store
from data_shards.sample import Sample, SampleError, parse_sample
from data_shards.sources.rows import SourceRow
from data_shards.variety import classify
from models.anyres import AnyresGeometry


@dataclass(frozen=True)
class Settings:
    """What decides the content of a data set besides its rows."""

    source: str
    licence: str
    preference: bool
    limits: ImageLimits
    tokenizer: str  # directory
    geometry: AnyresGeometry


@dataclass(frozen=True)
class Prepared:
    """A good sample: `columns` are the manifest's, those of the shard position left out."""

    number: int
    key: str
    record: bytes  # the JSON member
    images: tuple[StoredImage, ...]
    image_tiles: tuple[int, ...]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A bad sample, for the quarantine file."""

    number: int
    key: str
    origin: str
    reason: str


class Preparer:
    """Prepares rows; one in each worker process."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._tokenizer = ChatTokenizer.from_directory(settings.tokenizer)

    def __call__(self, rows: list[SourceRow]) -> list[Prepared | Refused]:
        """Results in the order of `rows`."""
        return [self._one(row) for row in rows]

    def _one(self, row: SourceRow) -> Prepared | Refused:
        key = f"{row.number:09d}"
        try:
            if row.problem is not None:
                raise SampleError(row.problem)
            return self._prepare(row, key)
        except ValueError as error:
            return Refused(row.number, key, row.origin, " ".join(str(error).split()))

    def _prepare(self, row: SourceRow, key: str) -> Prepared:
        settings, geometry = self._settings, self._settings.geometry
        sample = parse_sample(
            {**row.values, "messages": row.messages()},
            row.images(),
            key=key,
            source=settings.source,
            licence=settings.licence,
            origin=row.origin,
            preference=settings.preference,
        )
        images = tuple(_stored(data, n, settings) for n, data in enumerate(sample.images))
        tiles = tuple(geometry.n_tiles(image.height, image.width) for image in images)
        columns: dict[str, Any] = {
            **self._lengths(sample, [geometry.n_tokens(i.height, i.width) for i in images]),
            "tiles": sum(tiles),
            "variety": classify("\n".join(sample.answers()[: 1 if sample.is_pair else None])).label,
            "source": sample.source,
            "licence": sample.licence,
        }
        return Prepared(row.number, key, sample.to_json(), images, tiles, columns)

    def _lengths(self, sample: Sample, image_tokens: list[int]) -> dict[str, int]:
        if sample.chosen is None or sample.rejected is None:
            one = self._tokenizer.encode(sample.messages, image_tokens)
            lengths = (len(one.ids), one.n_targets, 0, 0)
        else:
            chosen, rejected = self._tokenizer.encode_preference(
                sample.messages, sample.chosen, sample.rejected, image_tokens
            )
            lengths = (len(chosen.ids), chosen.n_targets, len(rejected.ids), rejected.n_targets)
        names = ("tokens", "target_tokens", "tokens_rejected", "target_tokens_rejected")
        return dict(zip(names, lengths, strict=True))


def _stored(data: bytes, number: int, settings: Settings) -> StoredImage:
    try:
        return store(data, settings.limits)
    except ValueError as error:
        raise SampleError(f"image {number}: {error}") from None
