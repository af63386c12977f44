"""Archives of others, indexed where they lie and never rewritten: `data.sources.NAME.in_place`.

The data set's folder then holds the manifest and its index only; `shards_root` points at the
archives. Samples go through the checks of any other source. Since nothing can be changed, three
more must hold:
- an image is as we would store it, harmless metadata aside: the pixels that the loader would decode
  from these very bytes are those that we would have stored (no EXIF rotation, transparency, CMYK,
  palette, 16 bit, WebP);
- the images lie in the archive, not in the record and not elsewhere;
- one member, the JSON or the text, says it all: the loader reads no more.
CRC-32 and SHA-256 are those of the members as they are. A sample's key is its number, as in any
data set of ours, for other people's keys may come back in each archive; its origin names theirs.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema.data import ImageLimits, SourceConfig
from data_shards.examined import MANIFEST_COLUMNS
from data_shards.foreign_records import read_record
from data_shards.image_store import store
from data_shards.images import ImageError, decode
from data_shards.layouts import Fields, Rules, to_fields
from data_shards.prepare import Examined, Preparer, Refused, SourceChanged, key_of
from data_shards.sample import SampleError, parse_sample
from data_shards.sources import Source
from data_shards.sources.blocks import Block
from data_shards.sources.rows import SourceRow
from data_shards.tar_index import TarMember, TarSample, read_member, samples
from data_shards.writer import ShardInfo

_TEXTS = ("json", "txt")  # in the order in which the loader's one member is chosen
_FORMATS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_REMEDY = "set in_place: false to have it written anew"


def results(source: Source, block: Block, preparer: Preparer) -> Iterator[Examined | Refused]:
    """Every row of a block, examined. `Examined.row` holds the members' own sizes and digests.

    Raises:
        SourceError, TarError: an archive cannot be read or is damaged as a whole.
    """
    rows = source.rows(block)
    for row, (_, path, descriptor, sample) in zip(rows, _places(block), strict=True):
        one = preparer.examine(row)
        if isinstance(one, Examined):
            try:
                texts = [
                    read_member(path, descriptor, sample.members[name])
                    for name in _TEXTS
                    if name in sample.members
                ]
                one = _as_it_is(one, row, texts, source.config, preparer.limits)
            except SampleError as error:
                reason = " ".join(str(error).split())
                one = Refused(row.number, key_of(row.number), row.origin, reason)
        yield one


def manifest_rows(
    source: Source, block: Block, wanted: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Manifest rows of examined samples; `shard` counts the source's files.

    Args:
        wanted: rows of `examined.SCHEMA`, by number.

    Raises:
        SourceChanged: a member is not what was examined; names the sample.
    """
    files = {path: number for number, path in enumerate(source.files)}
    places = _places(block)
    for facts in wanted:
        found = next((place for place in places if place[0] == facts["number"]), None)
        if found is None:
            raise _changed(facts, "it is no longer there")
        _, path, descriptor, sample = found
        members = _by_digest(path, descriptor, sample, facts)
        record, *images = (
            members.get(digest) or _lost(facts)
            for digest in (facts["json_sha256"], *(i["sha256"] for i in facts["images"]))
        )
        yield {
            "key": key_of(facts["number"]),
            "shard": files[path],
            **{f"json_{name}": value for name, value in record.items()},
            "images": [
                {**place, **{name: image[name] for name in ("width", "height", "tiles")}}
                for place, image in zip(images, facts["images"], strict=True)
            ],
            **{name: facts[name] for name in MANIFEST_COLUMNS},
        }


def manifest_facts(
    config: SourceConfig, files: Sequence[Path], n_samples: Mapping[int, int]
) -> dict[str, Any]:
    """`shards_root`, `shards` and `layout` of a data set that stays in place.

    Args:
        files: of the source.
        n_samples: number of the file -> its samples in the manifest.

    The shards carry no digest of their own: that would be another pass over everything. Each
    member has one.
    """
    paths = [path.resolve() for path in files]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    shards = tuple(
        ShardInfo(path.relative_to(root).as_posix(), path.stat().st_size, "", n_samples.get(n, 0))
        for n, path in enumerate(paths)
    )
    layout = Rules.of(config).to_json()
    return {"shards_root": str(root), "shards": shards, "layout": layout}


def _places(block: Block) -> Iterator[tuple[int, Path, int, TarSample]]:
    """(row number, archive, its descriptor while this row is current, where the members lie)."""
    number = block.first_number
    for piece in block.pieces:
        descriptor = os.open(piece.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for sample in islice(samples(piece.file, piece.offset), piece.rows):
                yield number, piece.file, descriptor, sample
                number += 1
        finally:
            os.close(descriptor)


def _as_it_is(
    one: Examined,
    row: SourceRow,
    texts: Sequence[bytes],
    config: SourceConfig,
    limits: ImageLimits,
) -> Examined:
    """The result with sizes and digests of the members instead of what we would have written.

    Raises:
        SampleError: they cannot be used as they are.
    """
    fields = to_fields(row, config)
    if fields.images and not row.attached:
        raise SampleError(f"its images are not in the archive; {_REMEDY}")
    record = _sufficient(texts, fields, config, one.row)
    images = []
    for number, (data, facts) in enumerate(zip(fields.images, one.row["images"], strict=True)):
        digest = hashlib.sha256(data).digest()
        if digest != facts["sha256"]:
            _check_stays(data, number, limits)
        images.append({**facts, "size": len(data), "sha256": digest})
    changed = {"json_size": len(record), "json_sha256": hashlib.sha256(record).digest()}
    return replace(one, row={**one.row, **changed, "images": images})


def _sufficient(
    texts: Sequence[bytes], fields: Fields, config: SourceConfig, facts: Mapping[str, Any]
) -> bytes:
    """The member from which the loader gets the sample as it was examined."""
    sample = parse_sample(
        {"messages": fields.messages, "chosen": fields.chosen, "rejected": fields.rejected},
        fields.images,
        key=key_of(facts["number"]),
        source="",
        licence="",
        origin="",
        preference=config.preference,
    )
    expected = (list(sample.messages), sample.chosen, sample.rejected)
    layout = Rules.of(config).to_json()
    for data in texts:
        try:
            if data and read_record(data, layout, sample.key, len(sample.images)) == expected:
                return data
        except SampleError:
            continue
    raise SampleError(f"no one member, JSON or text, holds the whole sample; {_REMEDY}")


def _check_stays(data: bytes, number: int, limits: ImageLimits) -> None:
    """SampleError unless the bytes decode to the pixels that we would store."""
    if not data.startswith(_FORMATS):
        raise SampleError(f"image {number} is neither JPEG nor PNG; {_REMEDY}")
    try:
        image = decode(data, limits.max_pixels)
    except ImageError as error:
        raise SampleError(f"image {number}: {error}; {_REMEDY}") from None
    meant = decode(store(data, limits).data, limits.max_pixels)
    if image.size != meant.size or image.tobytes() != meant.tobytes():
        raise SampleError(
            f"image {number} does not decode to the picture people see (EXIF rotation, "
            f"transparency); {_REMEDY}"
        )


def _by_digest(
    path: Path, descriptor: int, sample: TarSample, facts: Mapping[str, Any]
) -> dict[bytes, dict[str, Any]]:
    """SHA-256 -> place of the members that have the size of one that was examined."""
    sizes = {facts["json_size"], *(image["size"] for image in facts["images"])}
    return {
        place["sha256"]: place
        for member in sample.members.values()
        if member.size in sizes
        for place in [_place(path, descriptor, member)]
    }


def _place(path: Path, descriptor: int, member: TarMember) -> dict[str, Any]:
    data = read_member(path, descriptor, member)
    return {
        "offset": member.offset,
        "size": member.size,
        "crc32": zlib.crc32(data),
        "sha256": hashlib.sha256(data).digest(),
    }


def _lost(facts: Mapping[str, Any]) -> dict[str, Any]:
    raise _changed(facts, "its bytes differ")


def _changed(facts: Mapping[str, Any], cause: str) -> SourceChanged:
    return SourceChanged(
        f"{facts['source']}: sample {facts['origin']} is not what was examined ({cause}); its "
        "archive was changed meanwhile: when that is done, give the same command again"
    )
