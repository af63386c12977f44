"""The parts of the demo run: each done once, timed, and done again only when its input changed."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import write_json

RECORD = "phases.json"


class PhaseFailed(ValueError):
    """A part that ended without success; what it wrote before is kept."""


@dataclass(frozen=True)
class Phase:
    """One part: `work` makes `outputs` out of `inputs`."""

    name: str
    what: str  # shown while it runs
    work: Callable[[], None]
    outputs: Sequence[Path]
    inputs: Sequence[Path] = ()  # hand-off files; other contents than recorded: do it again
    # Clears outputs that are there but were made from other inputs (True) or unknown ones (False).
    discard: Callable[[bool], None] | None = None
    skips_itself: bool = False  # looks closer than we do, and returns at once when all is there


class PhaseRecord:
    """`runs/NAME/phases.json`: of every phase its place, seconds, and digest of its inputs."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / RECORD
        self._entries: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self._entries = dict(json.loads(self.path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise PhaseFailed(f"{self.path} is damaged ({error}); remove it") from None

    def run(self, phase: Phase) -> None:
        """Do the phase unless its outputs are there and were made from the same inputs.

        Raises whatever the work raises; the time is recorded all the same.
        """
        digest = _digest(phase.inputs)
        number = len(self._entries)
        fresh = {"seconds": 0.0, "inputs": None, "number": number}
        entry = self._entries.get(phase.name, fresh)
        there = all(path.exists() for path in phase.outputs)
        known = there and entry["inputs"] == digest
        if known and phase.skips_itself:
            phase.work()
            return
        if known:
            print(f"== {phase.name}: done before, {entry['seconds']:.0f} s", flush=True)
            return
        if there and phase.discard is not None:
            phase.discard(entry["inputs"] is not None)
        print(f"== {phase.name}: {phase.what}", flush=True)
        began = time.monotonic()
        try:
            phase.work()
            entry["inputs"] = digest
        finally:
            entry["seconds"] += time.monotonic() - began
            self._entries[phase.name] = entry
            write_json(self.path, self._entries)
        missing = [path for path in phase.outputs if not path.exists()]
        if missing:
            raise PhaseFailed(f"{phase.name} ended without writing {missing[0]}")
        print(f"== {phase.name}: {entry['seconds']:.0f} s", flush=True)


def command(module: str, *arguments: str) -> None:
    """`python -m module arguments...`, its output shown as it comes.

    Raises:
        PhaseFailed: a non-zero exit; the program has said why in its last line.
    """
    words = [sys.executable, "-m", module, *arguments]
    print("   python -m " + " ".join([module, *arguments]), flush=True)
    process = subprocess.Popen(words)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C went to it as well; let it finish what it is writing
        raise
    except BaseException:  # asked to end: so is what we started
        process.terminate()
        process.wait()
        raise
    if code:
        raise PhaseFailed(
            f"{module} ended with exit code {code} (its reason is above); once that is mended, the "
            "same command goes on from there"
        )


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()
