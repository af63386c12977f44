"""A map over processes that keeps order, holds little, and leaves no process behind."""

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_shards.prepare import Prepared, Preparer, Refused, Settings
from data_shards.sources.rows import SourceRow

_ROWS_PER_TASK = 16
_TASKS_PER_WORKER = 3  # in flight, results not yet taken included

_preparer: Preparer | None = None  # in a worker process


class WorkerError(ValueError):
    """A worker process died."""


def prepare_rows(
    rows: Iterable[SourceRow], settings: Settings, workers: int
) -> Generator[Prepared | Refused, None, None]:
    """Every row prepared, in order, whatever the number of workers; 1 or less works in line.

    Raises:
        TokenizerError: the tokenizer cannot be used.
        WorkerError: a worker died, most likely for want of memory.
    """
    preparer = _preparer_for(settings)  # also in the parent: a bad tokenizer is one clear error
    tasks = _grouped(rows)
    if workers <= 1:
        for task in tasks:
            yield from preparer(task)
        return
    # Not fork: pyarrow and tokenizers have threads by now.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (settings,))
    pending: deque[Future[list[Prepared | Refused]]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_run, task))
            if len(pending) >= workers * _TASKS_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process died, probably out of memory; lower data.build_workers and run the "
            "same command again: finished shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _grouped(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    group: list[SourceRow] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_PER_TASK:
            yield group
            group = []
    if group:
        yield group


def _start(settings: Settings) -> None:
    global _preparer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides on Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _preparer = _preparer_for(settings)


def _preparer_for(settings: Settings) -> Preparer:
    # Pillow warns of broken metadata, which says nothing about the pixels.
    warnings.filterwarnings("ignore", module="PIL")
    return Preparer(settings)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: list[SourceRow]) -> list[Prepared | Refused]:
    assert _preparer is not None
    return _preparer(task)
