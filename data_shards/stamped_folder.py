"""A folder of results that all belong to one digest of inputs.

Builds with the same digest use it together; one with another digest replaces what is in it, unless
somebody is using it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_shards.durable import replacing
from data_shards.locks import FileLock

_STAMP = "inputs"


class FolderInUse(ValueError):
    """Another process builds the same data set from other inputs."""


class StampedFolder:
    """`path` and, beside it, the lock `path`.lock; the stamp lies in `path`/`place`."""

    def __init__(self, path: Path, place: str = "."):
        self.path = path
        self._stamp = path / place / _STAMP
        self._lock = path.with_name(f"{path.name}.lock")

    def stamp(self) -> str | None:
        """The digest that the content belongs to; None where there is none."""
        try:
            return self._stamp.read_text()
        except OSError:
            return None

    @contextmanager
    def opened(self, digest: str) -> Iterator[bool]:
        """Have the folder, stamped with `digest`, for as long as the block runs. Gives whether
        nobody else had it.

        Raises:
            FolderInUse: others are filling it from other inputs.
        """
        with FileLock(self._lock) as lock:
            alone = lock.try_exclusive()
            if alone:
                self._prepare(digest)
            lock.share()  # an instant without a lock: another build may have come between
            if self.stamp() != digest:
                raise FolderInUse(
                    f"{self.path} is being built by another process with other settings or inputs; "
                    "wait for it to end"
                )
            yield alone

    def _prepare(self, digest: str) -> None:
        if self.stamp() != digest:
            shutil.rmtree(self.path, ignore_errors=True)
            self._stamp.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._stamp) as file:
                file.write(digest.encode())
        for left in list(self.path.rglob("*.tmp")):  # of a build that was killed
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
