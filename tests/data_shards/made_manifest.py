"""Manifests of samples that exist by their lengths only, for tests of the plan."""

from collections.abc import Sequence
from pathlib import Path

import PIL

from data_shards.manifest import (
    Manifest,
    ManifestInfo,
    ManifestWriter,
    read_manifest,
    rows_to_table,
)
from data_shards.writer import ShardInfo


def made_manifest(
    folder: Path,
    tokens: Sequence[int],
    tiles: Sequence[int] | None = None,
    *,
    shard: int = 10,
    rejected: int = 0,
    tokenizer: str = "0" * 64,
) -> Manifest:
    """A data set named as `folder`, `shard` samples a shard; the sum of a sample's tiles is one
    image's. `rejected` > 0: pairs whose other answer has as many tokens."""
    folder.mkdir(parents=True)
    rows = []
    for n, count in enumerate(tokens):
        many = 0 if tiles is None else tiles[n]
        place = {"crc32": n, "sha256": bytes(32)}
        image = {"offset": n, "size": 1, "width": 9, "height": 9, "tiles": many, **place}
        rows.append(
            {
                "key": f"{n:06d}",
                "shard": n // shard,
                **{f"json_{name}": value for name, value in place.items()},
                "json_offset": n,
                "json_size": 1,
                "images": [image] if many else [],
                "tokens": count,
                "target_tokens": 1,
                "tokens_rejected": rejected,
                "target_tokens_rejected": min(rejected, 1),
                "tiles": many,
                **dict.fromkeys(("variety", "language", "source", "licence"), "x"),
            }
        )
    size = len(tokens) + 1024
    shards = [
        ShardInfo(f"{folder.name}-{n}.tar", size, "0" * 64, shard)
        for n in range(-(-len(rows) // shard))
    ]
    info = ManifestInfo(
        name=folder.name,
        preference=rejected > 0,
        tokenizer_digest=tokenizer,
        geometry_digest="0" * 64,
        pillow=PIL.__version__,
        shards=tuple(shards),
        inputs_digest="0" * 64,
        quarantined=0,
    )
    with ManifestWriter(folder) as writer:
        writer.add(rows_to_table(rows))
        writer.close(info)
    return read_manifest(folder / "manifest.parquet")
