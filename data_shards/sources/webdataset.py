"""Samples of WebDataset archives: a record, a caption, and images beside each other.

Members of a sample by extension: `json` is the record; `txt` the caption, as img2dataset writes;
what ends in an image format's extension is an image. Others are left aside.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_shards.sources import json_text
from data_shards.sources.blocks import FileScan, Piece, Starts
from data_shards.sources.json_text import JsonError
from data_shards.sources.rows import MAX_IMAGE_BYTES, SourceError
from data_shards.tar_index import TarError, TarMember, TarSample, read_member, samples

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_BYTES = 1 << 30  # of one sample
Row = tuple[int, str, dict[str, Any], list[tuple[str, bytes]], str | None]


def scan(path: Path, starts: Starts) -> FileScan:
    """Count the samples, from their headers alone.

    Raises:
        SourceError: the archive is damaged.
    """
    found, wanted = FileScan(), 0
    try:
        for sample in samples(path):
            if found.rows == wanted:
                found.offsets[wanted] = sample.offset
                wanted = starts.following(wanted + 1)
            found.rows += 1
    except TarError as error:
        raise SourceError(str(error)) from None
    return found


def read(piece: Piece) -> Iterator[Row]:
    """(row of the archive, key, record, images as (name, content), None or why it is bad).

    Raises:
        SourceError: the archive is damaged.
    """
    descriptor = os.open(piece.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = islice(samples(piece.file, piece.offset), piece.rows)
        for row, sample in enumerate(found, piece.first_row):
            record, images, problem = _contents(piece.file, descriptor, sample)
            yield row, sample.key, record, images, problem
    except TarError as error:
        raise SourceError(str(error)) from None
    finally:
        os.close(descriptor)


def _contents(
    path: Path, descriptor: int, sample: TarSample
) -> tuple[dict[str, Any], list[tuple[str, bytes]], str | None]:
    if sample.problem is not None:
        return {}, [], sample.problem
    size = sum(member.size for member in sample.members.values())
    if size > MAX_BYTES:
        return {}, [], f"its members have {size} bytes, more than {MAX_BYTES}"
    record: dict[str, Any] = {}
    images = []
    for extension, member in sample.members.items():
        limit = MAX_IMAGE_BYTES if is_image(extension) else json_text.MAX_BYTES
        if extension not in ("json", "txt") and not is_image(extension):
            continue
        if member.size > limit:
            return {}, [], f"its member {member.name} has over {limit} bytes"
        data = _read(path, descriptor, member)
        try:
            if extension == "json":
                record |= json_text.parse_object(data)
            elif extension == "txt":
                record.setdefault("txt", data.decode())
            else:
                images.append((member.name, data))
        except JsonError as error:
            return {}, [], f"its member {member.name}: {error}"
        except UnicodeDecodeError:
            return {}, [], f"its member {member.name} is not UTF-8"
    return record, images, None


def is_image(extension: str) -> bool:
    """Whether a member with this extension ("0.jpg", "png") is an image, by its name."""
    return extension.rpartition(".")[2] in IMAGES


def _read(path: Path, descriptor: int, member: TarMember) -> bytes:
    return read_member(path, descriptor, member)
