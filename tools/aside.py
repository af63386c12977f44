"""Folders that one process fills under another name, before they get the one they are for."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_shards.locks import FileLock


@contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold the file `lock` for this process; it is let go and removed at the end of the block.

    Raises:
        ValueError: another process holds it; `what` says what that one does.
    """
    with FileLock(lock) as held:
        # Whoever held it before may have removed it between the opening and the locking.
        if not held.try_exclusive() or not _same(lock, held):
            raise ValueError(f"{what}; wait for it, or end it")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _same(lock: Path, held: FileLock) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(held.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def filling(aside: Path) -> Iterator[None]:
    """The folder `aside`, for this process; at the end it is removed if nothing is in it.

    Raises:
        ValueError: another process fills it, or something else has its name.
    """
    with only_one(aside.with_name(f"{aside.name}.lock"), f"another command is writing {aside}"):
        if aside.is_symlink() or (aside.exists() and not aside.is_dir()):
            raise ValueError(f"{aside} is in the way; remove it")
        aside.mkdir(exist_ok=True)
        try:
            yield
        finally:
            if aside.is_dir() and not any(aside.iterdir()):
                aside.rmdir()


def must_be_free(out: Path) -> None:
    """ValueError where something has the name that a folder is to get."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists already; remove it or choose another out=")


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in `folder` but the names in `keep`; what links point to stays."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
