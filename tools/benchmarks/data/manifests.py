"""Manifests of data sets that do not exist: the lengths and tiles of a mixture, without pictures.

Sizes of pictures follow a stated law and become tiles and tokens by the model's own geometry, so
packing meets what it would meet; nothing can be read by these manifests.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa

from data_shards.manifest import SCHEMA, Manifest, ManifestInfo, ManifestWriter, read_manifest
from data_shards.writer import ShardInfo
from models.anyres import AnyresGeometry

PART = 100_000  # samples made at a time
SHARD = 8_192  # samples of a shard: a gigabyte of pictures of 120 kB
SIZES = 4_000  # different sizes of pictures
_JSON, _PICTURE = 2_048, 120_000  # bytes a member


@dataclass(frozen=True)
class Law:
    """What the samples of a source are like.

    Attributes:
        images: share of samples with 0, 1, 2 ... images.
        text: median tokens of the text, and the standard deviation of its logarithm.
    """

    images: tuple[float, ...]
    text: tuple[float, float]


CAPTIONS = Law((0.0, 1.0), (150, 0.6))
CHATS = Law((0.0, 0.9, 0.1), (250, 0.9))
DOCUMENTS = Law((0.0, 1.0), (350, 0.9))
TEXT = Law((1.0,), (735, 1.0))


@lru_cache(maxsize=8)
def picture_sizes(geometry: AnyresGeometry, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(height, width, tiles, tokens) of `SIZES` pictures, int64 each.

    Areas are lognormal with a median of 0.45 megapixels, from thumbnails to scans (90 % between 0.1
    and 2); three in five are landscape. Assumed: AMALIA-VL's own distribution is unpublished.
    """
    generator = np.random.default_rng(seed)
    area = np.exp(generator.normal(np.log(0.45e6), 0.9, SIZES)).clip(3_600, 12e6)
    aspect = np.exp(generator.normal(0.15, 0.4, SIZES)).clip(0.1, 10)
    height = np.sqrt(area / aspect).round().astype(np.int64)
    width = np.sqrt(area * aspect).round().astype(np.int64)
    sizes = list(zip(height.tolist(), width.tolist(), strict=True))
    tiles = np.array([geometry.n_tiles(*size) for size in sizes], np.int64)
    tokens = np.array([geometry.n_tokens(*size) for size in sizes], np.int64)
    return height, width, tiles, tokens


def write_law(
    folder: Path,
    law: Law,
    samples: int,
    geometry: AnyresGeometry,
    *,
    longest: int = 16_000,
    seed: int = 1,
    shard: int = SHARD,
) -> Manifest:
    """A manifest of `samples` samples by `law`, none longer than `longest` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, shards = [0] * -(-samples // shard), -(-samples // shard)
    with ManifestWriter(folder) as writer:
        for first in range(0, samples, PART):
            count = min(PART, samples - first)
            generator = np.random.default_rng([seed, first])
            table = _part(law, first, count, geometry, longest, generator, shard)
            writer.add(table)
            ends = np.asarray(table["json_offset"]) + np.asarray(table["json_size"])
            numbers = np.asarray(table["shard"])
            for number in np.unique(numbers).tolist():
                sizes[number] = max(sizes[number], int(ends[numbers == number].max()))
        writer.close(
            ManifestInfo(
                name=folder.name,
                preference=False,
                tokenizer_digest="0" * 64,
                geometry_digest=geometry.digest(),
                pillow=PIL.__version__,
                shards=tuple(
                    ShardInfo(f"{folder.name}-{n:05d}.tar", sizes[n] + 1024, "0" * 64, shard)
                    for n in range(shards)
                ),
                inputs_digest="0" * 64,
                quarantined=0,
            )
        )
    return read_manifest(folder / "manifest.parquet")


def _part(
    law: Law,
    first: int,
    count: int,
    geometry: AnyresGeometry,
    longest: int,
    generator: np.random.Generator,
    shard: int,
) -> pa.Table:
    height, width, tiles, tokens = picture_sizes(geometry)
    images = generator.choice(len(law.images), count, p=law.images)
    chosen = generator.integers(0, SIZES, int(images.sum()))
    owner = np.repeat(np.arange(count), images)
    text = np.exp(generator.normal(np.log(law.text[0]), law.text[1], count)).astype(np.int64) + 20
    shown = np.bincount(owner, tokens[chosen], count).astype(np.int64)
    text = np.minimum(text, longest - np.minimum(shown, longest - 20))
    rows = np.arange(first, first + count)
    room = _JSON + images * _PICTURE
    # Where a sample would lie if those before it in its shard were as large; never read.
    offsets = (rows % shard) * (_JSON + len(law.images) * _PICTURE)
    places = np.arange(len(owner)) - np.repeat(np.cumsum(images) - images, images)
    image = pa.StructArray.from_arrays(
        [
            pa.array(offsets[owner] + places * _PICTURE, pa.int64()),
            pa.array(np.full(len(owner), _PICTURE), pa.int64()),
            pa.array(np.zeros(len(owner)), pa.uint32()),
            _zeros(len(owner)),
            pa.array(width[chosen], pa.int32()),
            pa.array(height[chosen], pa.int32()),
            pa.array(tiles[chosen], pa.int32()),
        ],
        fields=list(SCHEMA.field("images").type.value_type),
    )
    ends = np.concatenate([[0], np.cumsum(images)])
    columns = {
        "key": pa.array(np.char.zfill(rows.astype("U9"), 9)),
        "shard": pa.array(rows // shard, pa.int32()),
        "json_offset": pa.array(offsets + room - _JSON, pa.int64()),
        "json_size": pa.array(np.full(count, _JSON), pa.int64()),
        "json_crc32": pa.array(np.zeros(count), pa.uint32()),
        "json_sha256": _zeros(count),
        "images": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), image),
        "tokens": pa.array(shown + text, pa.int32()),
        "target_tokens": pa.array(np.maximum(text // 2, 1), pa.int32()),
        "tokens_rejected": pa.array(np.zeros(count), pa.int32()),
        "target_tokens_rejected": pa.array(np.zeros(count), pa.int32()),
        "tiles": pa.array(np.bincount(owner, tiles[chosen], count), pa.int32()),
        **dict.fromkeys(("variety", "language", "source", "licence"), _labels(count)),
    }
    return pa.table(columns, schema=SCHEMA)


def _zeros(count: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), count, [None, pa.py_buffer(bytes(32 * count))]
    )


def _labels(count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(count), pa.int32()), pa.array(["undecided"])
    ).cast(pa.string())
