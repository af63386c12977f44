"""Samples to tar shards: POSIX USTAR, WebDataset naming (KEY.json, KEY.0.jpg, KEY.1.png, ...).

Headers are written by hand and carry no time, owner or machine, so the same samples give the same
bytes. A shard appears under its name only when it is complete and on disk.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from data_shards.durable import sync_directory

BLOCK = 512  # bytes; tar's unit
_MAX_NAME = 100  # USTAR's name field; longer names would need extensions
_END = b"\0" * (2 * BLOCK)


@dataclass(frozen=True)
class Member:
    """Where one member's content lies in its shard."""

    offset: int  # of the content, bytes from the start of the shard
    size: int  # bytes
    crc32: int
    sha256: bytes  # 32 bytes


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard file."""

    name: str
    size: int  # bytes
    sha256: str  # hex
    samples: int


def tar_header(name: str, size: int) -> bytes:
    """One 512-byte USTAR header of a regular file (mode 0644, owner 0, time 0).

    Raises:
        ValueError: a name over 100 bytes, or a file of 8 GiB or more.
    """
    encoded = name.encode()
    if len(encoded) > _MAX_NAME or size >= 8**11:
        raise ValueError(f"tar member {name} ({size} bytes) does not fit USTAR; shorten its key")
    header = bytearray(BLOCK)

    def put(start: int, content: bytes) -> None:
        header[start : start + len(content)] = content

    put(0, encoded)
    put(100, b"0000644\0" + b"0000000\0" * 2)
    put(124, b"%011o\0" % size + b"%011o\0" % 0)
    put(148, b" " * 8)  # the checksum counts its own field as blanks
    put(156, b"0" + b"\0" * 100 + b"ustar\x0000")
    put(148, b"%06o\0 " % sum(header))
    return bytes(header)


class ShardWriter:
    """Writes one shard to `path`; `close` makes it appear. Use as a context manager: on an
    error nothing is left under the final name."""

    def __init__(self, path: Path, writer: str = ""):
        """`writer` names who writes, where several may write the same shard at once."""
        self._path = path
        self._aside = path.with_name(f"{path.name}{writer}.tmp")
        self._file: BinaryIO = open(self._aside, "wb")
        self._digest = hashlib.sha256()
        self._samples = 0
        self.size = 0  # bytes written so far

    def add(
        self,
        key: str,
        members: Sequence[tuple[str, bytes]],
        digests: Sequence[bytes] | None = None,
    ) -> list[Member]:
        """Append one sample: (extension, content) of each member, such as ("0.jpg", bytes).

        `digests`: SHA-256 of each content, where the caller has just computed it.
        """
        if digests is None:
            digests = [hashlib.sha256(content).digest() for _, content in members]
        written = []
        for (extension, content), sha256 in zip(members, digests, strict=True):
            self._write(tar_header(f"{key}.{extension}", len(content)))
            written.append(Member(self.size, len(content), zlib.crc32(content), sha256))
            self._write(content)
            self._write(b"\0" * (-len(content) % BLOCK))
        self._samples += 1
        return written

    def close(self) -> ShardInfo:
        """End the archive, flush it to disk and rename it into place."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self._path)
        sync_directory(self._path.parent)
        return ShardInfo(self._path.name, self.size, self._digest.hexdigest(), self._samples)

    def discard(self) -> None:
        """Drop what was written; harmless after `close`."""
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
