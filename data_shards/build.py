"""Sources to shards and manifests: `python -m data_shards.build data=demo [only=[a,b]]`.

A data set whose inputs have not changed is left alone; an interrupted one goes on after its last
finished shard. The bytes written do not depend on the number of workers. Rows that cannot be
trained on are listed in quarantine.jsonl with the reason.
"""

import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa

from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ModelConfig
from data_shards.build_progress import Progress
from data_shards.chat import ChatTokenizer
from data_shards.dataset_folder import DatasetFolder, Part
from data_shards.manifest import (
    Manifest,
    ManifestError,
    ManifestInfo,
    read_manifest,
    rows_to_table,
    write_manifest,
)
from data_shards.prepare import Prepared, Refused, Settings
from data_shards.sources import jsonl, parquet
from data_shards.sources.rows import FIELDS, SourceRow
from data_shards.workers import prepare_rows
from data_shards.writer import Member, ShardWriter
from models.anyres import AnyresGeometry

VERSION = 1  # raise it when the same inputs would give other shards
_MAX_NAME = 64  # characters of a source's name, part of file names
_READERS = {"parquet": parquet, "jsonl": jsonl}


class BuildError(ValueError):
    """A data set that cannot be built; the message says why and what to do."""


def build_all(data: DataConfig, model: ModelConfig, only: Sequence[str] | None = None) -> None:
    """Build every source of `data`, or those named.

    Raises:
        BuildError, SourceError, TokenizerError: naming file, cause and remedy. Data sets that were
            finished before stay as they are.
    """
    unknown = sorted(set(only or ()) - set(data.sources))
    if unknown:
        raise BuildError(
            f"only= names {', '.join(unknown)}; data.sources has {', '.join(data.sources)}"
        )
    geometry = AnyresGeometry.from_model(model)
    tokenizer = ChatTokenizer.from_directory(data.tokenizer)
    tokenizer.require_model(model)
    for name, source in data.sources.items():
        if only is None or name in only:
            build_dataset(name, source, data, geometry, tokenizer.digest())


def build_dataset(
    name: str,
    source: SourceConfig,
    data: DataConfig,
    geometry: AnyresGeometry,
    tokenizer_digest: str,
) -> Manifest:
    """Build one data set under `data.root`/`name`, or return the one that is there already."""
    _check_source(name, source)
    files = _files(name, source)
    settings = Settings(
        source=name,
        licence=source.licence,
        preference=source.preference,
        limits=data.images,
        tokenizer=data.tokenizer,
        geometry=geometry,
    )
    inputs_digest = _inputs_digest(files, source, settings, data, tokenizer_digest)
    folder = DatasetFolder(Path(data.root), name)
    with folder.locked():
        existing = _existing(folder, inputs_digest)
        if existing is not None:
            print(f"{name}: up to date, {len(existing)} samples", flush=True)
            return existing
        parts = _write_parts(name, source, files, settings, data, folder, inputs_digest)
        info = ManifestInfo(
            name=name,
            preference=source.preference,
            tokenizer_digest=tokenizer_digest,
            geometry_digest=geometry.digest(),
            pillow=PIL.__version__,
            shards=tuple(part.shard for part in parts if part.shard),
            inputs_digest=inputs_digest,
            quarantined=sum(len(part.refused) for part in parts),
        )
        return _finish(folder, parts, info)


def _write_parts(
    name: str,
    source: SourceConfig,
    files: Sequence[Path],
    settings: Settings,
    data: DataConfig,
    folder: DatasetFolder,
    inputs_digest: str,
) -> list[Part]:
    parts = folder.open_building(inputs_digest)
    skip = parts[-1].next_row if parts else 0
    reader: Any = _READERS[source.format]
    counts = [reader.count(path) for path in files]
    refused = sum(len(part.refused) for part in parts)
    progress = Progress(name, sum(counts), skip)
    results = prepare_rows(_rows(source, files, counts, skip), settings, data.build_workers)

    def say(done: int, newly_refused: int) -> None:
        progress.update(done, refused + newly_refused)

    try:
        for part in _shards(results, len(parts), data.shard_bytes, folder, say):
            folder.write_part(len(parts), part)
            refused += len(part.refused)
            parts.append(part)
    finally:
        results.close()
    samples = sum(part.rows.num_rows for part in parts)
    size = sum(part.shard.size for part in parts if part.shard)
    progress.finish(f"{samples} samples, {refused} refused, {size / 1e6:.1f} MB")
    return parts


def _shards(
    results: Iterator[Prepared | Refused],
    number: int,
    shard_bytes: int,
    folder: DatasetFolder,
    say: Callable[[int, int], None],
) -> Iterator[Part]:
    """Fill shards one after the other; a shard is full when the next sample would pass the size."""
    ended = False
    waiting: Prepared | None = None  # the first sample of the next shard
    refused: list[dict[str, Any]] = []
    while not ended:
        rows: list[dict[str, Any]] = []
        next_row = 0
        with ShardWriter(folder.shard_path(number)) as writer:
            if waiting is not None:
                rows.append(_add(writer, number, waiting))
                next_row, waiting = waiting.number + 1, None
            ended = True
            for result in results:
                say(result.number + 1, len(refused))
                if isinstance(result, Refused):
                    refused.append(
                        {"origin": result.origin, "key": result.key, "reason": result.reason}
                    )
                elif rows and writer.size + _size(result) > shard_bytes:
                    waiting, ended = result, False
                    break
                else:
                    rows.append(_add(writer, number, result))
                next_row = result.number + 1
            shard = writer.close() if rows else None
        if rows or refused:
            yield Part(shard, next_row, refused, rows_to_table(rows))
        refused = []
        number += 1


def _add(writer: ShardWriter, shard: int, sample: Prepared) -> dict[str, Any]:
    """Write one sample; returns its manifest row."""
    contents = [("json", sample.record)]
    contents += [(f"{n}.{image.extension}", image.data) for n, image in enumerate(sample.images)]
    record, *images = writer.add(sample.key, contents)
    return {
        "key": sample.key,
        "shard": shard,
        **{f"json_{column}": value for column, value in _place(record).items()},
        "images": [
            {**_place(member), "width": image.width, "height": image.height, "tiles": tiles}
            for member, image, tiles in zip(images, sample.images, sample.image_tiles, strict=True)
        ],
        **sample.columns,
    }


def _place(member: Member) -> dict[str, Any]:
    names = ("offset", "size", "crc32", "sha256")
    return {name: getattr(member, name) for name in names}


def _size(sample: Prepared) -> int:
    """Bytes the sample will take in the shard, about."""
    return sum(1024 + len(data) for data in (sample.record, *(i.data for i in sample.images)))


def _finish(folder: DatasetFolder, parts: Sequence[Part], info: ManifestInfo) -> Manifest:
    refused = [entry for part in parts for entry in part.refused]
    quarantine = folder.write_quarantine(refused)
    rows = pa.concat_tables([part.rows for part in parts]) if parts else rows_to_table([])
    if not rows.num_rows:
        first = f", the first ({refused[0]['origin']}): {refused[0]['reason']}" if refused else ""
        raise BuildError(
            f"{info.name}: no sample is usable, {len(refused)} rows refused{first}; see "
            f"{quarantine} and correct data.sources.{info.name}"
        )
    varieties = Counter(rows["variety"].to_pylist())
    info = ManifestInfo(**{**vars(info), "varieties": dict(sorted(varieties.items()))})
    write_manifest(folder.building / folder.manifest.name, rows, info)
    folder.publish()
    return read_manifest(folder.manifest)


def _existing(folder: DatasetFolder, inputs_digest: str) -> Manifest | None:
    """The finished data set, if it was built from these inputs and is whole."""
    try:
        manifest = read_manifest(folder.manifest)
        manifest.check_shards()
    except ManifestError:
        return None
    return manifest if manifest.info.inputs_digest == inputs_digest else None


def _check_source(name: str, source: SourceConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > _MAX_NAME:
        raise BuildError(
            f"data.sources.{name}: a name is at most {_MAX_NAME} letters, digits, - and _"
        )
    if source.format not in _READERS:
        raise BuildError(f"data.sources.{name}.format={source.format!r}: use parquet or jsonl")
    unknown = sorted(set(source.columns) - set(FIELDS))
    if unknown:
        raise BuildError(
            f"data.sources.{name}.columns names {', '.join(unknown)}; the fields are "
            f"{', '.join(FIELDS)}"
        )


def _files(name: str, source: SourceConfig) -> list[Path]:
    files = sorted(Path(path) for path in glob.glob(source.input, recursive=True))
    files = [path for path in files if path.is_file()]
    if not files:
        raise BuildError(
            f"data.sources.{name}.input={source.input} matches no file; correct the path, or make "
            "the source files first"
        )
    return files


def _rows(
    source: SourceConfig, files: Sequence[Path], counts: Sequence[int], skip: int
) -> Iterator[SourceRow]:
    """Rows of all files in order, from row `skip` on."""
    reader: Any = _READERS[source.format]
    first = 0
    for path, count in zip(files, counts, strict=True):
        if first + count > skip:
            yield from reader.rows(
                path, source.columns, source.preference, first, max(skip - first, 0)
            )
        first += count


def _inputs_digest(
    files: Sequence[Path],
    source: SourceConfig,
    settings: Settings,
    data: DataConfig,
    tokenizer_digest: str,
) -> str:
    """SHA-256 of what a build reads. Source files count by name, size and time of change, images
    that they name by path not at all: touch the source file when those change."""
    folder = os.path.commonpath([path.parent for path in files])
    stats = [(os.path.relpath(path, folder), path.stat()) for path in files]
    content = {
        "version": VERSION,
        "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        "format": source.format,
        "columns": dict(source.columns),
        "licence": settings.licence,
        "preference": settings.preference,
        "name": settings.source,
        "images": vars(settings.limits),
        "shard_bytes": data.shard_bytes,
        "tokenizer": tokenizer_digest,
        "geometry": settings.geometry.digest(),
        "pillow": PIL.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    from conf.compose import compose  # Hydra is for commands only

    only: list[str] | None = None
    overrides = []
    for word in arguments:
        key, _, value = word.partition("=")
        if key == "only":
            only = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
        else:
            overrides.append(word)
    try:
        config = compose(overrides)
        config.data.check()
        build_all(config.data, config.model, only)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
