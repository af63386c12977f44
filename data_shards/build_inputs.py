"""Digests of what a data set is made from: they decide what is built again, and what is kept.

The digest of an *examination* covers the source's files (name, size, time of change; images that
they name by path not at all: touch the source file when those change), its settings, the limits of
images, the tokenizer, the tiling, Pillow, simplejpeg, and the rules of this code. The digest of a
*data set* covers that of its examination, the size of shards, and what the search for duplicates
compares: its rules, the examinations of the sources before it that count, and of the evaluation
sets.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
import simplejpeg

from conf.schema.data import DataConfig, SourceConfig
from data_shards import variety
from data_shards.fasttext_model import file_digest
from data_shards.prepare import Settings

# Raise them when the same inputs would give other results.
EXAMINE_VERSION = 2
DUPLICATES_VERSION = 1
WRITE_VERSION = 2
# Of a source's settings, those that the examination does not look at.
_LATER = ("input", "unique_images")


@dataclass(frozen=True)
class Compared:
    """An examined set that the search for duplicates compares with."""

    name: str
    digest: str
    unique_images: bool = False


def examine_digest(
    files: Sequence[Path], settings: Settings, tokenizer_digest: str, block_rows: int
) -> str:
    """SHA-256 (hex) of what an examination reads."""
    folder = os.path.commonpath([path.parent for path in files])
    stats = [(os.path.relpath(path, folder), path.stat()) for path in files]
    source = {k: v for k, v in asdict(settings.source).items() if k not in _LATER}
    content = {
        "version": EXAMINE_VERSION,
        "name": settings.name,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "source": source,
        "block_rows": block_rows,
        "images": asdict(settings.limits),
        "tokenizer": tokenizer_digest,
        "geometry": settings.geometry.digest(),
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,  # which JPEGs it takes for damaged; their hashes
        "variety": variety.VERSION,
        "variety_model": settings.variety_model and file_digest(settings.variety_model),
    }
    return _digest(content)


def dataset_digest(
    examined: str,
    source: SourceConfig,
    data: DataConfig,
    before: Sequence[Compared],
    evaluation: Sequence[Compared],
) -> str:
    """SHA-256 (hex) of what decides a data set."""
    rules = {k: v for k, v in asdict(data.duplicates).items() if k != "evaluation"}
    content = {
        "version": [WRITE_VERSION, DUPLICATES_VERSION],
        "examined": examined,
        "unique_images": source.unique_images,
        "shard_bytes": data.shard_bytes,
        "duplicates": rules,
        "before": [asdict(one) for one in before],
        "evaluation": [asdict(one) for one in evaluation],
    }
    return _digest(content)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
