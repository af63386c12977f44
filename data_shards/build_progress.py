"""Progress of a long build: one moving line on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

_BAR = 24  # characters
_ON_TERMINAL, _ELSEWHERE = 0.2, 15.0  # seconds between updates


class Progress:
    """Rows done of `total` rows of data set `name`; goes to `stream` (default: standard output)."""

    def __init__(self, name: str, total: int, done: int = 0, stream: TextIO | None = None):
        self._name, self._total, self._start_at = name, total, done
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._started = self._printed = time.monotonic()
        self._every = _ON_TERMINAL if self._terminal else _ELSEWHERE

    def update(self, done: int, refused: int) -> None:
        """Say where we are, if it is time to."""
        now = time.monotonic()
        if now - self._printed >= self._every:
            self._printed = now
            self._write(self._line(done, refused, now))

    def finish(self, text: str) -> None:
        """The last line of this data set."""
        self._write(f"{self._name}: {text}")
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def _line(self, done: int, refused: int, now: float) -> str:
        rate = (done - self._start_at) / max(now - self._started, 1e-9)
        left = (self._total - done) / rate if rate > 0 else 0.0
        share = min(done / max(self._total, 1), 1.0)
        filled = round(share * _BAR)
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] " if self._terminal else ""
        return (
            f"{self._name}: {bar}{done}/{self._total} rows, {refused} refused, {rate:.0f}/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
