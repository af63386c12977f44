"""Ways to damage shards, and what of them a sound reader must notice."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from data_shards.manifest import Manifest
from data_shards.writer import BLOCK, tar_header


@dataclass(frozen=True)
class Place:
    """A member of a sample: where its header, content and padding lie in which shard."""

    row: int
    what: str  # "JSON", "image 0"
    shard: Path
    offset: int  # of the content
    size: int

    @property
    def end(self) -> int:
        """The end of its padding."""
        return self.offset + self.size + -self.size % BLOCK


def places(manifest: Manifest) -> list[Place]:
    """Every member of a data set."""
    found = []
    for row in range(len(manifest)):
        shard = manifest.shards_directory / manifest.info.shards[manifest.shard[row]].name
        found.append(Place(row, "JSON", shard, *manifest.json_span[row].tolist()))
        images = range(*manifest.first_image[row : row + 2])
        for number, image in enumerate(images):
            span = manifest.image_span[image].tolist()
            found.append(Place(row, f"image {number}", shard, *span))
    return found


def _write(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def flip_bits(chance: Random, members: list[Place]) -> None:
    """One bit to sixty-four, anywhere in a shard."""
    path = chance.choice(members).shard
    data = bytearray(path.read_bytes())
    for _ in range(2 ** chance.randrange(7)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def flip_one_content_bit(chance: Random, members: list[Place]) -> None:
    """In a record or a picture, which Pillow would decode without a word."""
    member = chance.choice(members)
    offset = member.offset + chance.randrange(member.size)
    byte = member.shard.read_bytes()[offset]
    _write(member.shard, offset, bytes([byte ^ 1 << chance.randrange(8)]))


def zero_a_run(chance: Random, members: list[Place]) -> None:
    """A hole, as file systems leave them."""
    path = chance.choice(members).shard
    length = chance.randrange(1, 3000)
    _write(path, chance.randrange(path.stat().st_size - length), bytes(length))


def overwrite_a_run(chance: Random, members: list[Place]) -> None:
    """Bytes of something else."""
    path = chance.choice(members).shard
    length = chance.randrange(1, 3000)
    _write(path, chance.randrange(path.stat().st_size - length), chance.randbytes(length))


def zero_a_header(chance: Random, members: list[Place]) -> None:
    """Where tarfile and webdataset stop reading, without a word."""
    member = chance.choice(members)
    _write(member.shard, member.offset - BLOCK, bytes(BLOCK))


def forge_a_header(chance: Random, members: list[Place]) -> None:
    """Another name or size, with a right checksum."""
    member = chance.choice(members)
    name = chance.choice(["../../etc/passwd", "000000001.json", "000000001.0.gif", "a"])
    size = chance.choice([member.size, member.size + 1, 0, 8**11 - 1])
    _write(member.shard, member.offset - BLOCK, tar_header(name, size))


def swap_members(chance: Random, members: list[Place]) -> None:
    """The contents of two members, as far as the shorter one goes."""
    one, other = chance.sample(members, 2)
    size = min(one.size, other.size)
    contents = [m.shard.read_bytes()[m.offset : m.offset + size] for m in (other, one)]
    for member, content in zip((one, other), contents, strict=True):
        _write(member.shard, member.offset, content)


def swap_headers(chance: Random, members: list[Place]) -> None:
    """So that each content has the other's name."""
    one, other = chance.sample(members, 2)
    contents = [m.shard.read_bytes()[m.offset - BLOCK : m.offset] for m in (other, one)]
    for member, content in zip((one, other), contents, strict=True):
        _write(member.shard, member.offset - BLOCK, content)


def repeat_a_member(chance: Random, members: list[Place]) -> None:
    """A whole sample's bytes, header included, in another's place."""
    one, other = chance.sample(members, 2)
    size = min(one.end - one.offset, other.end - other.offset) + BLOCK
    _write(
        other.shard,
        other.offset - BLOCK,
        one.shard.read_bytes()[one.offset - BLOCK :][:size],
    )


def truncate(chance: Random, members: list[Place]) -> None:
    """Cut short, by a byte or to nothing."""
    path = chance.choice(members).shard
    size = path.stat().st_size
    os.truncate(path, chance.choice([size - 1, size - 1024, 0, chance.randrange(size)]))


def lose_a_block(chance: Random, members: list[Place]) -> None:
    """512 bytes gone, everything after them moved, filled up at the end."""
    path = chance.choice(members).shard
    data = path.read_bytes()
    at = chance.randrange(len(data) // BLOCK) * BLOCK
    path.write_bytes(data[:at] + data[at + BLOCK :] + bytes(BLOCK))


def append(chance: Random, members: list[Place]) -> None:
    """Bytes after the end."""
    with open(chance.choice(members).shard, "ab") as file:
        file.write(chance.choice([bytes(BLOCK), chance.randbytes(BLOCK), b"x"]))


def swap_shards(chance: Random, members: list[Place]) -> None:
    """Each under the other's name."""
    one, other = chance.sample(sorted({member.shard for member in members}), 2)
    contents = other.read_bytes(), one.read_bytes()
    for path, content in zip((one, other), contents, strict=True):
        path.write_bytes(content)


def remove(chance: Random, members: list[Place]) -> None:
    """A shard that is gone, or a folder of its name."""
    path = chance.choice(members).shard
    path.unlink()
    if chance.randrange(2):
        path.mkdir()


DAMAGES: list[Callable[[Random, list[Place]], None]] = [
    flip_bits,
    flip_one_content_bit,
    zero_a_run,
    overwrite_a_run,
    zero_a_header,
    forge_a_header,
    swap_members,
    swap_headers,
    repeat_a_member,
    truncate,
    lose_a_block,
    append,
    swap_shards,
    remove,
]


class Bytes:
    """The shards of a data set as they should be."""

    def __init__(self, manifest: Manifest) -> None:
        folder = manifest.shards_directory
        self._sound = {
            folder / s.name: (folder / s.name).read_bytes() for s in manifest.info.shards
        }
        self.members = places(manifest)

    def restore(self) -> None:
        """Make them so again."""
        for path, content in self._sound.items():
            if path.is_dir():
                path.rmdir()
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)

    def changed(self) -> tuple[set[int], set[int], set[str]]:
        """What differs now: (rows with other contents, rows where also headers and padding count,
        names of shards where anything does). By comparing bytes, nothing else."""
        contents, samples, shards = set(), set(), set()
        differs: dict[Path, np.ndarray] = {}
        for path, content in self._sound.items():
            now = path.read_bytes() if path.is_file() else b""
            size = min(len(now), len(content))
            flags = np.ones(len(content), bool)
            flags[:size] = np.frombuffer(now, np.uint8)[:size] != np.frombuffer(
                content, np.uint8, size
            )
            differs[path] = flags
            if now != content:
                shards.add(path.name)
        for member in self.members:
            flags = differs[member.shard]
            if flags[member.offset : member.offset + member.size].any():
                contents.add(member.row)
            if flags[member.offset - BLOCK : member.end].any():
                samples.add(member.row)
        return contents, samples, shards
