"""Writing so that a kill at any instant leaves the last good state readable."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_shards.durable import replacing

_CHUNK = 1 << 22  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename, fsync the folder."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Parse a JSON file; ValueError naming file, cause and remedy if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
        raise ValueError(f"{path}: {what} is damaged ({error}); {remedy}") from None


def digest_and_fsync(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, which is flushed to disk first."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


@contextmanager
def saying_where_full(folder: Path, remedy: str) -> Iterator[None]:
    """Name the folder when the disk is full, which the system's own error does not.

    Raises:
        OSError: as the block does.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(f"{folder} could not be written ({error.strerror}); {remedy}") from error
