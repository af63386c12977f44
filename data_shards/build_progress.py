"""Progress of a long build: one moving line on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

_BAR = 24  # characters
_ON_TERMINAL, _ELSEWHERE = 0.2, 15.0  # seconds between updates


class Progress:
    """Rows done of `total` rows of one phase (`title`); goes to `stream`, by default standard
    output."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None):
        self._title, self._total = title, total
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._started = self._printed = time.monotonic()
        self._every = _ON_TERMINAL if self._terminal else _ELSEWHERE
        self._shown = False

    def update(self, done: int, refused: int) -> None:
        """Say where we are, if it is time to."""
        now = time.monotonic()
        if now - self._printed >= self._every:
            self._printed, self._shown = now, True
            self._write(self._line(done, refused, now))

    def finish(self) -> None:
        """Make room for other lines."""
        if self._terminal and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, done: int, refused: int, now: float) -> str:
        rate = done / max(now - self._started, 1e-9)
        left = (self._total - done) / rate if rate > 0 else 0.0
        share = min(done / max(self._total, 1), 1.0)
        filled = round(share * _BAR)
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] " if self._terminal else ""
        hours, minutes = divmod(int(left) // 60, 60)
        eta = f"{hours}:{minutes:02d}:{int(left) % 60:02d}" if rate > 0 else "?"
        return (
            f"{self._title}: {bar}{done}/{self._total} rows, {refused} refused, {rate:.0f}/s, "
            f"{eta} left"
        )

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()
