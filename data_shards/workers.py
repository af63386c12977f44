"""Blocks worked on by several processes, in any order; none of them outlives its parent."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.block_work import examine_block, write_block
from data_shards.build_progress import Progress
from data_shards.chat import ChatTokenizer
from data_shards.dataset_folder import DatasetFolder
from data_shards.examined import ExaminedFolder
from data_shards.prepare import Preparer, Settings
from data_shards.sources import Source, open_source
from data_shards.sources.blocks import Block

_PATIENCE = 0.2  # seconds between looks at how far the workers are
_WAIT = (0.2, 5.0)  # seconds between looks at blocks that other builds have: first, longest
EXAMINE, WRITE = "examine", "write"


class WorkerError(ValueError):
    """A worker process died."""


@dataclass(frozen=True)
class Recipe:
    """What a process needs to know of one source, or of one evaluation set."""

    settings: Settings
    examined: Path
    root: Path | None  # of the data sets; None: it is only examined
    shard_bytes: int


@dataclass(frozen=True)
class Task:
    """One phase of one block. `key`: of its recipe."""

    phase: str
    key: str
    block: Block


class _Works:
    """What one process does: opens each source once, and one tokenizer for all."""

    def __init__(self, recipes: Mapping[str, Recipe], count: Any):
        # One process is one core's work; threads would only pass texts to each other.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Pillow warns of broken metadata, which says nothing about the pixels.
        warnings.filterwarnings("ignore", module="PIL")
        self._recipes, self._count = recipes, count
        self._tokenizers: dict[str, ChatTokenizer] = {}
        self._opened: dict[str, tuple[Source, Preparer]] = {}

    def do(self, task: Task) -> bool:
        """Whether the block is done now; False where another build is working on it."""
        recipe = self._recipes[task.key]
        examined = ExaminedFolder(recipe.examined)
        with examined.lock(task.block.number) as lock:
            if not lock.try_exclusive():
                return False
            source, preparer = self._open(task.key)
            if task.phase == EXAMINE:
                if task.block.number not in examined.done():
                    examine_block(source, task.block, preparer, examined, self._count)
                return True
            assert recipe.root is not None
            folder = DatasetFolder(recipe.root, recipe.settings.name)
            write_block(
                source, task.block, preparer, examined, folder, recipe.shard_bytes, self._count
            )
        return True

    def _open(self, key: str) -> tuple[Source, Preparer]:
        if key not in self._opened:
            settings = self._recipes[key].settings
            directory = settings.tokenizer
            if directory not in self._tokenizers:
                self._tokenizers[directory] = ChatTokenizer.from_directory(directory)
            preparer = Preparer(settings, self._tokenizers[directory])
            self._opened[key] = open_source(settings.name, settings.source), preparer
        return self._opened[key]


class Workers:
    """`workers` processes, started when there is something for them; 1 or less works in line."""

    def __init__(self, workers: int, recipes: Mapping[str, Recipe]):
        self._workers, self._recipes = workers, recipes
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[Any] = set()  # child processes that are not ours
        # Not fork: pyarrow and tokenizers have threads by now.
        self._context = multiprocessing.get_context("spawn")
        self._counters: Any = [0, 0] if workers <= 1 else self._context.Array("q", 2)
        self._here: _Works | None = None

    def run(self, title: str, tasks: Sequence[Task]) -> None:
        """Do every task, waiting for those that other builds work on.

        Raises:
            SourceError, TokenizerError, SourceChanged: of a task; others may be done or not.
            WorkerError: a worker died, most likely for want of memory.
        """
        if not tasks:
            return
        self._counters[0] = self._counters[1] = 0
        progress = Progress(title, sum(task.block.rows for task in tasks))
        pause, left = _WAIT[0], list(tasks)
        try:
            while left:
                busy = [task for task, done in self._round(left, progress) if not done]
                if len(busy) == len(left):
                    time.sleep(pause)
                    pause = min(2 * pause, _WAIT[1])
                left = busy
        except BrokenProcessPool:
            raise WorkerError(
                "a worker process died, probably out of memory; lower data.build_workers and run "
                "the same command again: finished blocks are kept"
            ) from None
        finally:
            progress.finish()

    @contextmanager
    def closing(self) -> Iterator["Workers"]:
        """End the processes with the block: at once when interrupted, else after the blocks that
        they are working on."""
        try:
            yield self
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - self._others:
                process.kill()
            raise
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def _round(self, tasks: Iterable[Task], progress: Progress) -> Iterator[tuple[Task, bool]]:
        if self._workers <= 1:
            yield from self._in_line(tasks, progress)
            return
        if self._pool is None:
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self._workers, self._context, _start, (self._recipes, self._counters)
            )
        pending: dict[Future[bool], Task] = {self._pool.submit(_run, task): task for task in tasks}
        while pending:
            ended, _ = wait(pending, _PATIENCE, FIRST_COMPLETED)
            progress.update(*self._counters)
            for future in ended:
                yield pending.pop(future), future.result()

    def _in_line(self, tasks: Iterable[Task], progress: Progress) -> Iterator[tuple[Task, bool]]:
        def count(rows: int, refused: int) -> None:
            self._counters[0] += rows
            self._counters[1] += refused
            progress.update(*self._counters)

        if self._here is None:
            self._here = _Works(self._recipes, count)
        self._here._count = count
        for task in tasks:
            yield task, self._here.do(task)


# --- in a worker process --------------------------------------------------------------------------

_works: _Works | None = None


def _start(recipes: Mapping[str, Recipe], counters: Any) -> None:
    global _works
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides on Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def count(rows: int, refused: int) -> None:
        with counters.get_lock():
            counters[0] += rows
            counters[1] += refused

    _works = _Works(recipes, count)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(task: Task) -> bool:
    assert _works is not None
    return _works.do(task)
