"""Signals that come before training has begun: the process ends with 143, as after a save.

Until the loop's own handlers are installed (`pipeline.callbacks.stop_signals`) there is nothing to
save: imports, loading, and the reference pass, whose file appears whole or not at all. Python runs
a handler only between bytecodes of the main thread, which may sit in a collective for minutes;
therefore a thread waits for the byte that the interpreter writes at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 128 + signal.SIGTERM

_sender: int | None = None  # what the interpreter writes signal numbers to, while armed
_DISARM = b"\0"  # no signal's number


def arm() -> None:
    """End this process with 143 at the next signal. Called once, from the main thread."""
    global _sender
    receiver, _sender = os.pipe()
    os.set_blocking(_sender, False)
    signal.set_wakeup_fd(_sender, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _nothing)
    os.register_at_fork(after_in_child=_default_in_child)
    threading.Thread(target=_wait, args=(receiver,), daemon=True).start()


def disarm() -> None:
    """From now on signals are the business of whoever installed handlers for them."""
    global _sender
    if _sender is not None:
        signal.set_wakeup_fd(-1)
        os.write(_sender, _DISARM)
        _sender = None


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes that begin meanwhile never see SIGNALS; this one sees them afterwards.

    Slurm signals every process of a rank: a helper that died of it would take along the very
    checkpoint that the signal asks for.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # The first spawn would start it, and let SIGINT and SIGTERM through again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _default_in_child() -> None:
    """A child shares the pipe; its signals must not end its parent, and must end it."""
    global _sender
    if _sender is not None:
        signal.set_wakeup_fd(-1)
        _sender = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread does the work; without a handler there would be no byte for it."""


def _wait(receiver: int) -> None:
    while (byte := os.read(receiver, 1)) != _DISARM:
        if byte[0] in SIGNALS:
            _stop(signal.Signals(byte[0]).name)
    os.close(receiver)


def _stop(name: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{name} before the first step: nothing to save, stopped", flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED)  # peers and helper threads may never answer
