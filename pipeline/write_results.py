"""Where Megatron's checkpoint writer leaves its results: a file that forked processes share.

Its own queue (`filesystem_async._get_write_results_queue`) is a server in a process that every rank
starts at its first save: seconds of imports, 250 MB, and left behind when the rank is killed.
"""

import os
import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_LENGTH = 8  # bytes before each result


class WriteResults:
    """What Megatron asks of its queue: `put` in a forked writer, the rest in the rank itself."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._file = tempfile.TemporaryFile(buffering=0)
        self._read_to = 0

    def put(self, result: Any) -> None:
        """Append one result (pickled: it is our own process's)."""
        data = pickle.dumps(result)
        view = memoryview(len(data).to_bytes(_LENGTH, "little") + data)
        while view:
            end = os.fstat(self._file.fileno()).st_size
            view = view[os.pwrite(self._file.fileno(), view, end) :]

    def empty(self) -> bool:
        """Whether every result has been taken."""
        return os.fstat(self._file.fileno()).st_size <= self._read_to

    def get_nowait(self) -> Any:
        """The oldest result. Raises queue.Empty without one, or where its writer died over it."""
        head = os.pread(self._file.fileno(), _LENGTH, self._read_to)
        length = int.from_bytes(head, "little")
        data = os.pread(self._file.fileno(), length, self._read_to + _LENGTH)
        if len(head) < _LENGTH or len(data) < length:
            os.ftruncate(self._file.fileno(), self._read_to)
            raise queue.Empty
        self._read_to += _LENGTH + length
        return pickle.loads(data)


def use_shared_file() -> None:
    """Have Megatron's writer use a file of this process; before a save is planned."""
    results = filesystem_async._results_queue
    if not isinstance(results, WriteResults) or results.owner != os.getpid():
        filesystem_async._results_queue = WriteResults()
