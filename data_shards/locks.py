"""Locks between builds of the same data set, of one node or of several (flock).

A lock ends with its process, however that ends. Where the file system knows no locks (ENOLCK and
the like) every lock is granted: work may then be done twice, but what is written is the same, and
appears whole.
"""

import errno
import fcntl
from pathlib import Path
from types import TracebackType

_NONE_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class FileLock:
    """An advisory lock on `path`, which is made if need be and stays. A context manager that lets
    go at its end."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+")

    def try_exclusive(self) -> bool:
        """Take it alone; False where anybody has it."""
        try:
            self._flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def exclusive(self) -> None:
        """Take it alone, waiting as long as others have it."""
        self._flock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Take it together with others, waiting while one has it alone."""
        self._flock(fcntl.LOCK_SH)

    def fileno(self) -> int:
        """Descriptor of the open file, whatever its name has become."""
        return self._file.fileno()

    def release(self) -> None:
        """Let go; harmless when it is not held."""
        self._file.close()

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _flock(self, how: int) -> None:
        try:
            fcntl.flock(self._file, how)
        except OSError as error:
            if error.errno not in _NONE_HERE:
                raise
