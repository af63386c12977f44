"""The index of one data set: a Parquet file with one row per sample, and facts about the whole.

Columns (one row per sample): key, shard (number), json_{offset,size,crc32,sha256}, tokens,
target_tokens, tokens_rejected, target_tokens_rejected (0 unless a preference pair), tiles, variety,
source, licence, and images: a list of {offset, size, crc32, sha256, width, height, tiles}.
Offsets and sizes are bytes inside the shard; width and height are pixels. Facts about the whole
stand in the schema metadata as JSON under "amalia_vl".
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.durable import replacing
from data_shards.writer import ShardInfo

FORMAT = 1
FILE_NAME = "manifest.parquet"
REMEDY = "restore it or build the data set again (make shards)"
_METADATA_KEY = b"amalia_vl"

_IMAGE = pa.struct(
    [
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("crc32", pa.uint32()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tiles", pa.int32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("json_crc32", pa.uint32()),
        ("json_sha256", pa.binary(32)),
        ("images", pa.list_(_IMAGE)),
        ("tokens", pa.int32()),
        ("target_tokens", pa.int32()),
        ("tokens_rejected", pa.int32()),
        ("target_tokens_rejected", pa.int32()),
        ("tiles", pa.int32()),
        ("variety", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
    ]
)


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the file, the cause and the remedy."""


@dataclass(frozen=True)
class ManifestInfo:
    """Facts about the whole data set."""

    name: str
    preference: bool
    tokenizer_digest: str
    geometry_digest: str
    pillow: str  # version; resizing changed between 12 and 13, for instance
    shards: tuple[ShardInfo, ...]
    inputs_digest: str  # of all that the build read; decides whether to build again
    quarantined: int  # samples refused by the build
    varieties: Mapping[str, int] = field(default_factory=dict)  # label -> samples
    digest: str = ""  # SHA-256 of the rows and the facts that decide batches
    format: int = FORMAT


@dataclass(frozen=True)
class Manifest:
    """A checked manifest in memory; n samples, m images in all."""

    path: Path
    info: ManifestInfo
    table: pa.Table
    shard: np.ndarray  # int32 [n]
    json_span: np.ndarray  # int64 [n, 2]: offset, size
    json_crc32: np.ndarray  # uint32 [n]
    first_image: np.ndarray  # int64 [n + 1]: images of sample i are first_image[i:i+2]
    image_span: np.ndarray  # int64 [m, 2]: offset, size
    image_crc32: np.ndarray  # uint32 [m]
    image_hw: np.ndarray  # int32 [m, 2]: height, width
    image_tiles: np.ndarray  # int32 [m]
    tokens: np.ndarray  # int32 [n]
    tokens_rejected: np.ndarray  # int32 [n], 0 unless a pair
    target_tokens: np.ndarray  # int32 [n], both answers of a pair
    tiles: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shards_directory(self) -> Path:
        """Where the tar files are."""
        return self.path.parent / "shards"

    def key(self, row: int) -> str:
        """Key of one sample."""
        return str(self.table["key"][row].as_py())

    def check_shards(self) -> None:
        """ManifestError unless every shard is there with its size (contents: CRC on reading)."""
        for shard in self.info.shards:
            path = self.shards_directory / shard.name
            if not path.exists():
                raise ManifestError(f"{path} is missing; {REMEDY}")
            size = path.stat().st_size
            if size != shard.size:
                raise ManifestError(
                    f"{path} has {size} bytes, its manifest says {shard.size}; {REMEDY}"
                )

    def check_environment(self, tokenizer_digest: str, geometry_digest: str) -> None:
        """ManifestError if token lengths or tiles were computed for something else."""
        info = self.info
        for what, built, now, remedy in (
            (
                "tokenizer",
                info.tokenizer_digest,
                tokenizer_digest,
                "set data.tokenizer to that one",
            ),
            (
                "tiling",
                info.geometry_digest,
                geometry_digest,
                "set model to the one it was built for",
            ),
            ("Pillow version", info.pillow, PIL.__version__, f"install pillow=={info.pillow}"),
        ):
            if built != now:
                raise ManifestError(
                    f"{self.path} was built with another {what} ({built[:12]}, now {now[:12]}); "
                    f"{remedy}, or build the shards again (make shards)"
                )


def write_manifest(path: Path, rows: pa.Table, info: ManifestInfo) -> ManifestInfo:
    """Write `rows` (of `SCHEMA`) atomically; returns `info` with its digest filled in."""
    rows = rows.cast(SCHEMA).combine_chunks()
    info = ManifestInfo(**{**_fields(info), "digest": content_digest(rows, info)})
    metadata = {_METADATA_KEY: json.dumps(asdict(info), sort_keys=True).encode()}
    with replacing(path) as file:
        pq.write_table(
            rows.replace_schema_metadata(metadata),
            file,
            compression="zstd",
            write_page_checksum=True,
        )
    return info


def content_digest(rows: pa.Table, info: ManifestInfo) -> str:
    """SHA-256 over the rows and over what decides batches; not over how Parquet stored them."""
    digest = hashlib.sha256()
    facts = [info.format, info.name, info.preference, info.tokenizer_digest, info.geometry_digest]
    facts += [info.pillow, *(asdict(shard) for shard in info.shards)]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name in rows.column_names:
        column = rows[name].combine_chunks()
        _update(digest, column.chunk(0) if isinstance(column, pa.ChunkedArray) else column)
    return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ManifestError: the file is missing or damaged, its digest differs, or a row points outside
            its shard; names the file, the row and the cause.
    """
    if not path.exists():
        raise ManifestError(f"{path} does not exist; build the data set first (make shards)")
    try:
        table = pq.read_table(path, page_checksum_verification=True, memory_map=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ManifestError(f"{path} is not a readable Parquet file ({reason}); {REMEDY}") from None
    info = _read_info(path, table)
    if not table.schema.remove_metadata().equals(SCHEMA):
        raise ManifestError(f"{path} does not have a manifest's columns; {REMEDY}")
    table = table.replace_schema_metadata(None).combine_chunks()
    if content_digest(table, info) != info.digest:
        raise ManifestError(f"{path} does not match its own digest, so it was changed; {REMEDY}")
    manifest = _columns(path, info, table)
    _check_rows(manifest)
    return manifest


def _fields(info: ManifestInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


def _update(digest: Any, array: pa.Array) -> None:
    """Feed an array's values (no nulls here), independent of slicing and of buffer padding."""
    if pa.types.is_list(array.type):
        digest.update(np.asarray(array.value_lengths()).astype("<i8").tobytes())
        array = array.flatten()
        for index in range(array.type.num_fields):
            _update(digest, array.field(index))
    elif pa.types.is_string(array.type):
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
        digest.update(np.diff(ends).astype("<i8").tobytes())
        if data is not None:
            digest.update(memoryview(data)[ends[0] : ends[-1]])
    elif pa.types.is_fixed_size_binary(array.type):
        width, data = array.type.byte_width, array.buffers()[1]
        if data is not None:
            digest.update(memoryview(data)[array.offset * width :][: len(array) * width])
    else:
        digest.update(np.asarray(array).astype("<i8").tobytes())


def _read_info(path: Path, table: pa.Table) -> ManifestInfo:
    raw = (table.schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise ManifestError(f"{path} is a Parquet file but not a manifest; {REMEDY}")
    try:
        values = json.loads(raw)
        if values.get("format") != FORMAT:
            raise ManifestError(
                f"{path} has manifest format {values.get('format')}, this version reads {FORMAT}; "
                "build the data set again (make shards)"
            )
        values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
        return ManifestInfo(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path} has damaged metadata ({error}); {REMEDY}") from None


def _columns(path: Path, info: ManifestInfo, table: pa.Table) -> Manifest:
    if table.num_rows == 0:
        raise ManifestError(f"{path} lists no sample; {REMEDY}")
    if any(column.null_count for column in table.columns):
        raise ManifestError(f"{path} has empty cells; {REMEDY}")

    def numbers(name: str) -> np.ndarray:
        return table[name].to_numpy()

    images = table["images"].combine_chunks()
    images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
    flat = images.flatten()

    def of_images(name: str) -> np.ndarray:
        return flat.field(name).to_numpy(zero_copy_only=False)

    lengths = np.asarray(images.value_lengths()).astype(np.int64)
    return Manifest(
        path=path,
        info=info,
        table=table.select(["key", "variety", "source", "licence"]),
        shard=numbers("shard"),
        json_span=np.stack([numbers("json_offset"), numbers("json_size")], axis=1),
        json_crc32=numbers("json_crc32"),
        first_image=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        image_span=np.stack([of_images("offset"), of_images("size")], axis=1),
        image_crc32=of_images("crc32"),
        image_hw=np.stack([of_images("height"), of_images("width")], axis=1),
        image_tiles=of_images("tiles"),
        tokens=numbers("tokens"),
        tokens_rejected=numbers("tokens_rejected"),
        target_tokens=numbers("target_tokens") + numbers("target_tokens_rejected"),
        tiles=numbers("tiles"),
    )


def _check_rows(manifest: Manifest) -> None:
    """The digest guards against damage; this guards against a manifest that was written wrong."""
    sizes = np.array([shard.size for shard in manifest.info.shards], np.int64)
    inside = (manifest.shard >= 0) & (manifest.shard < len(sizes))
    _require(manifest, inside, "names a shard that the manifest does not list")
    limit = sizes[manifest.shard]
    span = manifest.json_span
    _require(
        manifest,
        (span[:, 0] >= 0) & (span[:, 1] > 0) & (span.sum(axis=1) <= limit),
        "has a JSON member outside its shard",
    )
    counts = np.diff(manifest.first_image)
    owner = np.repeat(np.arange(len(manifest)), counts)
    span = manifest.image_span
    good = (span[:, 0] >= 0) & (span[:, 1] > 0) & (span.sum(axis=1) <= limit[owner])
    good &= (manifest.image_hw > 0).all(axis=1) & (manifest.image_tiles > 0)
    _require(manifest, _all_of(good, owner, len(manifest)), "has an image outside its shard")
    pair = manifest.tokens_rejected > 0
    _require(manifest, pair == manifest.info.preference, "is a pair among samples, or the reverse")
    _require(
        manifest, (manifest.tokens > 0) & (manifest.target_tokens > 0), "has no token to train on"
    )


def _all_of(good: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    return np.bincount(owner[~good], minlength=n) == 0


def _require(manifest: Manifest, good: np.ndarray, cause: str) -> None:
    bad = np.flatnonzero(~good)
    if len(bad):
        row = int(bad[0])
        raise ManifestError(f"{manifest.path}: row {row} ({manifest.key(row)}) {cause}; {REMEDY}")


def rows_to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Row dictionaries as a table of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)
