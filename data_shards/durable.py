"""Writing so that a kill at any instant leaves the last good state readable."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file that appears as `path` only when the block ends without an error, flushed to disk.

    `writer` names who writes, where several may write the same file at once.
    """
    aside = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
