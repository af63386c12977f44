"""Checkpoints that are written while training goes on.

A save copies the state of its step (from the GPU to the host's memory; on a CPU, fork's copy on
write), forks a process that writes this rank's files and their digests, and returns. `poll`, once
a step, asks whether every rank's process has ended, and then makes the files a checkpoint exactly
as a save that waits does: gathered metadata, digests of everything, the manifest last, the rename.
Two saves never overlap: the second waits for the first.

Megatron's `AsyncCallsQueue(persistent=False)` does the fork alike, but it cannot tell why a writer
died, and finishing such a save leaves ranks waiting for each other; therefore the process is
started here.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from pipeline import checkpoint
from pipeline.checkpoint_files import Digests, Place, commit, discard, last_line, open_aside
from pipeline.early_signals import signals_held
from pipeline.files import digest_and_fsync
from pipeline.manifest import Manifest

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has come to exist."""

    step: int
    directory: Path
    seconds: float  # from the start of the save


@dataclass
class _Writing:
    """The save in progress: what this rank needs to finish it."""

    place: Place
    manifest: Manifest  # its files still unknown
    started: float
    finalize: list[Callable[[], None]]
    process: ForkProcess | None  # none where this rank has nothing to write
    answers: Connection | None


class AsyncSaver:
    """Saves of one stage, at most one in progress. Every method is called by all ranks alike."""

    def __init__(
        self,
        stage_dir: Path,
        keep: int,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_commit` runs on every rank before files become a checkpoint, and may raise."""
        self.stage_dir, self.keep = stage_dir, keep
        self._before_commit = before_commit
        self._writing: _Writing | None = None

    @property
    def seconds_so_far(self) -> float | None:
        """Age of the save in progress; None without one."""
        return None if self._writing is None else time.perf_counter() - self._writing.started

    def start(self, state: "checkpoint.TrainingState") -> None:
        """Copy the state of `state.step` and begin to write it; no other save is in progress.

        Raises:
            OSError: the folder cannot be made, or what is written at once has no room.
        """
        assert self._writing is None, "two saves would overlap; finish() comes first"
        started = time.perf_counter()
        place = open_aside(self.stage_dir, state.step)
        try:
            # Helpers that begin now (Megatron's queue server, the writer and its children) never
            # see the signals that Slurm sends to every process of a task.
            with signals_held():
                _forget_results()
                request = checkpoint.write_request(state, place.aside)
                process, answers = _fork_writer(request)
        except (CheckpointException, OSError, RuntimeError) as error:
            discard(place)
            raise place.failure(last_line(error)) from error
        self._writing = _Writing(
            place, state.manifest(), started, request.finalize_fns, process, answers
        )

    def poll(self) -> Saved | None:
        """The checkpoint that was in progress, once every rank has written its files.

        One small all-reduce while a save is in progress, none otherwise.

        Raises:
            OSError: on every rank, where any could not write; earlier checkpoints are untouched.
        """
        writing = self._writing
        if writing is None:
            return None
        alive = writing.process is not None and writing.process.is_alive()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        running = torch.tensor([float(alive)], device=device)
        dist.all_reduce(running)
        return None if running.item() > 0 else self._finish(writing)

    def finish(self) -> Saved | None:
        """Wait for the save in progress; None without one. Raises as `poll`."""
        writing = self._writing
        if writing is None:
            return None
        if writing.process is not None:
            writing.process.join()
        return self._finish(writing)

    def abandon(self) -> None:
        """Kill this rank's writer, if any: the process ends for another reason. No collective."""
        if self._writing is not None and self._writing.process is not None:
            self._writing.process.kill()
            self._writing.process.join()
        self._writing = None

    def _finish(self, writing: _Writing) -> Saved:
        self._writing = None
        place = writing.place
        files = _agreed_digests(writing)
        try:
            for finalize in writing.finalize:
                finalize()
        except (CheckpointException, OSError, RuntimeError) as error:
            discard(place)
            raise place.failure(last_line(error)) from error
        self._before_commit()
        commit(place, replace(writing.manifest, files=files), self.keep)
        return Saved(place.step, place.final, time.perf_counter() - writing.started)


def _forget_results() -> None:
    """Megatron keeps one queue of results; those of a save that failed would be the next one's."""
    results = filesystem_async._results_queue
    while results is not None and not results.empty():
        results.get_nowait()


def _agreed_digests(writing: _Writing) -> Digests:
    """What all writers wrote. OSError on every rank if one of them failed."""
    mine: tuple[str, Digests] = ("", {})
    if writing.process is not None and writing.answers is not None:
        writing.process.join()
        code = writing.process.exitcode
        died = f"the process that writes ended with code {code}"
        try:
            mine = writing.answers.recv() if writing.answers.poll() else (died, {})
        except EOFError:
            mine = (died, {})
        writing.answers.close()
        writing.process.close()
    everyone: list[tuple[str, Digests] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    answers = [answer for answer in everyone if answer is not None]
    for cause, _ in answers:
        if cause:
            discard(writing.place)
            raise writing.place.failure(cause)
    return {name: entry for _, files in answers for name, entry in files.items()}


def _fork_writer(request: Any) -> tuple[ForkProcess | None, Connection | None]:
    """Stage the tensors on the host and fork the process that writes them.

    As `TemporalAsyncCaller` of megatron.core.dist_checkpointing.strategies.async_utils: fork, so
    that gigabytes need not travel, and no garbage collection in the child, which must not free
    tensors of the parent's GPU.
    """
    if request.async_fn is None:
        return None, None
    arguments = list(request.async_fn_args)  # [rank, buckets (path, ...), queue of results]
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    torch.cuda.synchronize()
    names = [Path(bucket[0]) for bucket in arguments[1]]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    collecting = gc.isenabled()
    gc.disable()
    try:
        process = context.Process(
            target=_write, args=(request.async_fn, arguments, names, sender, os.getpid())
        )
        process.start()
    finally:
        if collecting:
            gc.enable()
    sender.close()
    # Megatron's writer, which lives until the save is finished, shares this list and needs its
    # length only: let go of copies that were made for the save.
    request.async_fn_args[1][:] = [(path, key, ([], [])) for path, key, _ in arguments[1]]
    return process, receiver


def _write(
    function: Callable[..., None],
    arguments: list[Any],
    paths: list[Path],
    answers: Connection,
    parent: int,
) -> None:
    """In the child: write, then digest while the pages are still in memory."""
    os.register_at_fork(after_in_child=_die_with_parent)
    _die_with_parent()
    if os.getppid() != parent:
        return
    try:
        function(*arguments)
        answers.send(("", {path.name: digest_and_fsync(path) for path in paths}))
    except Exception as error:  # whatever it was, the parent must hear of it
        answers.send((last_line(error), {}))
    answers.close()


def _die_with_parent() -> None:
    """A writer must not outlive a rank that is killed: it would hold a copy of the state."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
