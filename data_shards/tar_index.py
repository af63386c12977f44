"""What is in a tar archive and where, read strictly; samples as webdataset groups them.

Python's tarfile, and so webdataset, takes a damaged header for the end of the archive and drops
the rest without a word. Here every header must be whole until the two zero blocks that end an
archive, and after those only the zeros that fill a tape record may follow.

Nothing is ever extracted. A sound entry that holds no data to train on is either
- skipped: directories, volume labels, names that webdataset skips (no extension, `__name__`); or
- named with its `problem`: links, devices, pipes; names that are absolute, leave the archive by
  `..`, are not UTF-8 or hold control characters; names that stand twice.
Memory: one sample's members, and 8 bytes and a little more for each sample's key.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from data_shards import tar_headers as headers
from data_shards.tar_headers import BLOCK, HeaderError

_TAPE_RECORD = 20 * BLOCK  # tar, tarfile and webdataset fill archives up to a multiple of it
MOST_ZEROS = 2 * BLOCK + _TAPE_RECORD  # at the end; more may be where members were
_REMEDY = "copy the archive again from where it came, or leave it out"
# As webdataset: up to the first dot of the last component; the directory belongs to the key.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)\Z")
_META = re.compile(r"__[^/]*__(?:/|\Z)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class TarError(ValueError):
    """An archive that cannot be trusted; names the file, the byte, the cause and the remedy."""


@dataclass(frozen=True)
class TarMember:
    """One entry: its content is `size` bytes at `offset` of the archive.

    `problem` says why it must not be used (see above), else None; it then may have no content.
    """

    name: str
    offset: int
    size: int
    header_offset: int  # where its first header starts, extended ones included
    problem: str | None = None


@dataclass
class TarSample:
    """Consecutive members of one key.

    Attributes:
        key: directory and name up to the first dot.
        members: by extension, lower case, without the first dot ("json", "0.jpg").
        problem: why the sample must not be used, else None.
        offset: where its first header starts.
    """

    key: str
    offset: int
    members: dict[str, TarMember] = field(default_factory=dict)
    problem: str | None = None


def scan(path: Path) -> Iterator[TarMember]:
    """Every member of an archive in order, directories and volume labels left out.

    Raises:
        TarError: the file cannot be read, is compressed, is cut short, or has a damaged header or
            bytes that belong to nothing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TarError(f"{path} cannot be opened ({error.strerror}); correct the path") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TarError(f"{path} is no regular file; give the archive itself")
        yield from _Scanner(path, descriptor, status.st_size).members()
    finally:
        os.close(descriptor)


def samples(path: Path, start: int = 0) -> Iterator[TarSample]:
    """The samples of an archive in order, grouped as webdataset groups them.

    What has a key but a problem is a sample with that problem, so that it can be put on record. A
    key that comes back after others is a problem of the later part.

    Args:
        start: `offset` of the first sample wanted. The headers before it are read all the same:
            otherwise it would depend on `start` whether a repeated key is noticed.

    Raises:
        TarError: as `scan`.
    """
    return (sample for sample in _grouped(path) if sample.offset >= start)


def _grouped(path: Path) -> Iterator[TarSample]:
    seen: set[int] = set()
    sample: TarSample | None = None
    for member in scan(path):
        key, extension = _split(member)
        if key is None:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = TarSample(key, member.header_offset)
            # Not Python's hash, which is another in each process.
            digest = blake2b(key.encode(), digest_size=8).digest()
            if (number := int.from_bytes(digest, "big")) in seen:
                sample.problem = f"its key {key} stands earlier in the archive already"
            seen.add(number)
        if member.problem is not None:
            sample.problem = sample.problem or member.problem
        elif extension in sample.members:
            sample.problem = sample.problem or f"its member {member.name} stands twice"
        else:
            sample.members[extension] = member
    if sample is not None:
        yield sample


def read_member(path: Path, descriptor: int, member: TarMember) -> bytes:
    """The content of a member, from an open archive.

    Raises:
        TarError: the archive cannot be read there or is shorter than when it was scanned.
    """
    return _Scanner(path, descriptor, member.offset + member.size).read(member.offset, member.size)


def _split(member: TarMember) -> tuple[str | None, str]:
    """(key, extension); the key is None where webdataset would skip the name."""
    match = None if _META.match(member.name) else _NAME.match(member.name)
    if match is not None:
        return match[1], match[2].lower()
    return (member.name, "") if member.problem is not None else (None, "")


def _problem_of(name: str) -> str | None:
    if not name or name.endswith("/"):
        return f"its member {name!r} is no file by its name"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return f"the name of its member {name!r} is absolute"
    if ".." in re.split(r"[/\\]", name):
        return f"the name of its member {name!r} leaves the archive"
    if _CONTROL.search(name):
        return f"the name of its member {name!r} holds control characters"
    return None


class _Scanner:
    """Walks one archive; `_at` is the byte up to which everything is explained."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path, self._descriptor, self._size = path, descriptor, size
        self._at = 0

    def members(self) -> Iterator[TarMember]:
        while True:
            start = self._at
            try:
                member = self._next()
            except HeaderError as error:
                raise self._error(start, f"{error}") from None
            if member is None:
                return
            if isinstance(member, TarMember):
                yield member

    def _next(self) -> TarMember | str | None:
        """The next member, a word for what is skipped, None at the end."""
        start = self._at
        name: bytes | None = None
        linked = False
        pax: dict[bytes, bytes] | None = None
        while True:
            block = self._take(BLOCK, "its next header")
            if not any(block):
                if start != self._at - BLOCK:
                    raise HeaderError("an extended header stands before the end, with no member")
                self._check_end(start)
                return None
            if start == 0 == self._at - BLOCK:
                self._check_compression(block)
            header = headers.parse_header(block)
            if header.kind == headers.LONG_NAME and name is None:
                name = headers.long_name(self._extended(header.size))
            elif header.kind == headers.LONG_LINK and not linked:
                self._extended(header.size)
                linked = True
            elif header.kind == headers.PAX and pax is None:
                pax = headers.parse_pax(self._extended(header.size))
            elif header.kind == headers.PAX_GLOBAL:
                content = headers.parse_pax(self._extended(header.size))
                if any(key in (b"path", b"size", b"linkpath") for key in content):
                    raise HeaderError("a global header names or sizes all members")
                if start == self._at - BLOCK - _padded(header.size):
                    return "global header"
            else:
                return self._member(start, header, name, pax or {})

    def _member(
        self,
        start: int,
        header: headers.Header,
        long_name: bytes | None,
        pax: dict[bytes, bytes],
    ) -> TarMember | str:
        if any(key.startswith(b"GNU.sparse.") for key in pax):
            raise HeaderError("a sparse member; write the archive without --sparse")
        named = headers.pax_name(pax)
        if long_name is not None and named is not None and long_name != named:
            raise HeaderError("its GNU name and its PAX name differ")
        raw = long_name or named or header.name
        size = headers.pax_size(pax, header.size)
        kind, directory = header.kind, header.kind == headers.DIRECTORY
        # Version 7 had no type for directories.
        directory = directory or (kind == b"\0" and raw.endswith(b"/"))
        label = kind == headers.VOLUME_LABEL
        if kind not in headers.REGULAR and kind not in headers.NAMED and not (directory or label):
            raise HeaderError(f"a member of type {kind!r}, which this version does not read")
        if size and (directory or label or kind in headers.NAMED):
            raise HeaderError("an entry that is no file claims content")
        offset = self._at
        if size > self._size - offset:
            raise HeaderError(
                f"its member {raw[:200]!r} should have {size} bytes, the file ends after "
                f"{self._size - offset}"
            )
        self._at += _padded(size)
        if self._at > self._size:
            raise HeaderError(f"the file ends within the padding of its member {raw[:200]!r}")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            name = raw.decode("utf-8", "backslashreplace")
            problem: str | None = f"the name of its member {name} is not UTF-8"
        else:
            problem = _problem_of(name)
        if directory or label:
            return "directory"
        if kind in headers.NAMED:
            problem = f"its member {name!r} is {headers.NAMED[kind]}"
        elif header.twofold and raw == header.name:
            problem = problem or f"its member {name!r} has two names in one header"
        return TarMember(name, offset, size, start, problem)

    def _check_end(self, start: int) -> None:
        """What follows the first zero block: zeros, as many as a writer would put there."""
        zeros = self._size - start
        at = self._at
        while at < self._size:
            chunk = self.read(at, min(1 << 20, self._size - at))
            if any(chunk):
                where = at + len(chunk) - len(chunk.lstrip(b"\0"))
                raise HeaderError(
                    f"a zeroed header, but the archive goes on (byte {where}): a damaged header, "
                    "or bytes after the end"
                )
            at += len(chunk)
        if zeros < 2 * BLOCK:
            raise HeaderError("one zero block instead of the two that end an archive: cut short")
        if zeros > MOST_ZEROS:
            raise HeaderError(
                f"{zeros} zero bytes at the end, more than any writer's filling: members may have "
                "been there"
            )

    def _check_compression(self, block: bytes) -> None:
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic) and block[257:262] != b"ustar":
                raise HeaderError(f"compressed with {name}: unpack it to a plain tar first")

    def _extended(self, size: int) -> bytes:
        if size > headers.MOST_EXTENDED:
            raise HeaderError(f"an extended header of {size} bytes")
        content = self._take(_padded(size), "an extended header")
        return content[:size]

    def _take(self, size: int, what: str) -> bytes:
        if self._at + size > self._size:
            raise HeaderError(
                f"the file ends within {what} (it has {self._size} bytes, without the two zero "
                "blocks that end an archive): cut short"
            )
        data = self.read(self._at, size)
        self._at += size
        return data

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""
        data = bytearray()
        while len(data) < size:
            try:
                chunk = os.pread(self._descriptor, size - len(data), offset + len(data))
            except OSError as error:
                cause = f"cannot be read ({error.strerror})"
                raise self._error(offset, cause) from None
            if not chunk:
                raise self._error(offset, "the file became shorter while it was read")
            data += chunk
        return bytes(data)

    def _error(self, offset: int, cause: str) -> TarError:
        return TarError(f"{self._path}: byte {offset}: {cause}; {_REMEDY}")


def _padded(size: int) -> int:
    return size + -size % BLOCK
