"""Samples that the card shows: the manifest's digest decides which, so builds show the same."""

import base64
import hashlib
import io
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_shards import records
from data_shards.images import decode
from data_shards.manifest import Manifest
from data_shards.reader import DescriptorCache, ShardReader
from data_shards.sample import IMAGE_MARK

SHOWN = 12
TURNS_OF = 1000  # samples whose records are opened to count turns
_LOOKED_FOR_IMAGE = 16  # rows after the chosen one that may stand in for it to show an image
_THUMBNAIL = (360, 270)  # px on the card's page, doubled for fine screens
_MOST_TEXT, _MOST_TURNS, _MOST_IMAGES = 600, 6, 3
_MAX_PIXELS = 1 << 28  # those of the build were smaller, or it refused them


@dataclass(frozen=True)
class Shown:
    """One sample on the card."""

    key: str
    facts: str
    pictures: list[str]  # data URLs
    pictures_left_out: int
    turns: list[tuple[str, str]]  # (role, text)
    turns_left_out: int
    problem: str = ""


def chosen_rows(manifest: Manifest, number: int, purpose: str) -> list[int]:
    """Up to `number` different rows, one out of each of as many equal stretches of the data set."""
    n = len(manifest)
    number = min(number, n)
    rows = []
    for part in range(number):
        first, stop = part * n // number, (part + 1) * n // number
        seed = f"{manifest.info.digest} {purpose} {part}".encode()
        draw = int.from_bytes(hashlib.sha256(seed).digest()[:8], "big")
        rows.append(first + draw % (stop - first))
    return rows


class SampleReader:
    """Opens records and pictures of one data set."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._descriptors = DescriptorCache()
        self._reader = ShardReader(manifest, self._descriptors)

    def close(self) -> None:
        """Close the shards."""
        self._descriptors.close()

    def turns(self) -> tuple[Counter[int], int]:
        """(answers in a sample -> samples, how many could not be read) of `TURNS_OF` samples."""
        counts: Counter[int] = Counter()
        bad = 0
        for row in chosen_rows(self._manifest, TURNS_OF, "turns"):
            try:
                messages, chosen, _ = records.read(self._manifest, row, self._record(row))
            except (ValueError, OSError):
                bad += 1
                continue
            counts[sum(m["role"] == "assistant" for m in messages) + (chosen is not None)] += 1
        return counts, bad

    def _record(self, row: int) -> bytes:
        manifest = self._manifest
        offset, size = manifest.json_span[row].tolist()
        path = manifest.shards_directory / manifest.info.shards[int(manifest.shard[row])].name
        with self._descriptors.descriptor(path) as descriptor:
            return os.pread(descriptor, size, offset)

    def shown(self) -> list[Shown]:
        """The samples of the card, with a picture wherever one is near."""
        rows = chosen_rows(self._manifest, SHOWN, "shown")
        return [
            self._shown(self._with_image(row, part, len(rows))) for part, row in enumerate(rows)
        ]

    def _with_image(self, row: int, part: int, parts: int) -> int:
        """The next row with an image in the same stretch, unless it is far."""
        first_image = self._manifest.first_image
        stop = min(row + _LOOKED_FOR_IMAGE, (part + 1) * len(self._manifest) // parts)
        near = (r for r in range(row, stop) if first_image[r + 1] > first_image[r])
        return next(near, row)

    def _shown(self, row: int) -> Shown:
        manifest = self._manifest
        key = manifest.key(row)
        facts = f"{int(manifest.tokens[row]):,} tokens, {int(manifest.tiles[row])} tiles"
        try:
            record, images = self._reader.read(row)
            messages, chosen, rejected = records.read(manifest, row, record)
        except (ValueError, OSError) as error:
            return Shown(key, facts, [], 0, [], 0, " ".join(str(error).split()))
        turns = [(str(message["role"]), _text(message["content"])) for message in messages]
        turns += [("chosen", chosen)] if chosen is not None else []
        turns += [("rejected", rejected)] if rejected is not None else []
        pictures, problem = [], ""
        for image in images[:_MOST_IMAGES]:
            try:
                pictures.append(thumbnail(image))
            except (ValueError, OSError) as error:
                problem = " ".join(str(error).split())
        return Shown(
            key,
            facts,
            pictures,
            len(images[_MOST_IMAGES:]),
            [(role, _cut(text)) for role, text in turns[:_MOST_TURNS]],
            len(turns[_MOST_TURNS:]),
            problem,
        )


def thumbnail(data: bytes) -> str:
    """A small JPEG of a stored image, as a data URL."""
    picture = decode(data, _MAX_PIXELS)
    picture.thumbnail(_THUMBNAIL, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content.replace(IMAGE_MARK, "").strip()
    return "".join(item["text"] for item in content if item["type"] == "text").strip()


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + " […]"
