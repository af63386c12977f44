"""The items of an array, which of them are done, and which wave runs which.

    runs/NAME/arrays/TASK/NNN/{submit.sh, job.json, items.json, log_0.out, ...}   a wave
    runs/NAME/arrays/TASK/done/ITEM.json     it ended well: seconds, exit code, last line
    runs/NAME/arrays/TASK/begun/ITEM.json    it was started, and has not ended well since
    runs/NAME/arrays/TASK/failed/ITEM.json   how it failed the last time
    runs/NAME/arrays/TASK/stopped.json       why a job did not submit the next wave, if it did not

The files, not Slurm, say what is left to do: a wave may be killed at any instant.
"""

import glob
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from slurm.files import write_text

ITEMS = "items.json"
DONE, BEGUN, FAILED = "done", "begun", "failed"
STOPPED = "stopped.json"
STOP = "STOP"  # a file in the run or in arrays/TASK by which anybody ends it
MOST_TRIES = 2  # waves of one submission that start an item
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,179}")


@dataclass(frozen=True)
class Item:
    """One independent piece of work.

    Raises ConfigError when the name cannot be a file's.
    """

    name: str
    words: tuple[str, ...]  # after `python -m`
    stamp: str = ""  # digest of the files that its result depends on
    accepted: tuple[int, ...] = (0,)  # exit codes that are results
    result: str = ""  # a glob that must match for a marker to count
    shell: str = ""  # the line that starts its ranks; empty: one process

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{self.name!r} cannot name an item; use letters, digits, '.', '_' and '-'"
            )


@dataclass(frozen=True)
class Wave:
    """What one submitted array runs: items.json."""

    task: str
    number: int  # of this wave
    submission: int  # the number of the first wave of the same command
    arguments: tuple[str, ...]  # of the command, for the next wave
    per_element: int  # items of one element
    hours: float
    elements: tuple[tuple[Item, ...], ...]
    left_out: tuple[str, ...] = ()  # items that failed too often
    waiting: int = 0  # elements for later waves

    def write(self, directory: Path) -> None:
        """To `directory`/items.json, atomically."""
        items = {item.name: asdict(item) for element in self.elements for item in element}
        value = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in _PLAIN},
            "elements": [[item.name for item in element] for element in self.elements],
            "items": items,
        }
        write_text(directory / ITEMS, json.dumps(value, indent=1) + "\n")


_PLAIN = (
    "task", "number", "submission", "arguments", "per_element", "hours", "left_out", "waiting"
)  # fmt: skip


def read_wave(directory: Path) -> Wave:
    """Parse items.json. Raises ConfigError naming the file when it is missing or damaged."""
    path = directory / ITEMS
    value = _read(path)
    try:
        if value.pop("format") != _FORMAT:
            raise ValueError(f"another format than {_FORMAT}")
        items = {name: _item(plain) for name, plain in value.pop("items").items()}
        elements = tuple(tuple(items[name] for name in names) for names in value.pop("elements"))
        lists: dict[str, Any] = {n: tuple(value.pop(n)) for n in ("arguments", "left_out")}
        return Wave(**value, **lists, elements=elements)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); submit the array again") from error


def _item(plain: Mapping[str, Any]) -> Item:
    lists = {name: tuple(plain[name]) for name in ("words", "accepted")}
    return Item(**{**plain, **lists})


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; submit the array again") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); submit the array again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged (no JSON object); submit the array again")
    return value


@dataclass(frozen=True)
class TaskFolder:
    """runs/NAME/arrays/TASK."""

    root: Path
    _made: set[str] = field(default_factory=set, compare=False)

    @classmethod
    def of(cls, run: Path, task: str) -> "TaskFolder":
        return cls(run / "arrays" / task)

    def wave(self, number: int) -> Path:
        return self.root / f"{number:03d}"

    def waves(self) -> list[int]:
        """Numbers of the waves so far, in order."""
        found = self.root.glob(f"[0-9]*/{ITEMS}")
        return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())

    def next_number(self) -> int:
        """The first number that no folder has."""
        taken = [int(path.name) for path in self.root.glob("[0-9]*") if path.name.isdigit()]
        return max(taken, default=0) + 1

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Those without a marker that was made by the same words from the same files."""
        made = self._names(DONE)
        return [item for item in items if item.name not in made or not self.is_done(item)]

    def is_done(self, item: Item) -> bool:
        """Whether its marker is there and speaks of this very item."""
        marker = self.record(DONE, item.name)
        return (
            marker.get("words") == list(item.words)
            and marker.get("stamp") == item.stamp
            and marker.get("code") in item.accepted
            and (not item.result or any(True for _ in glob.iglob(item.result)))
        )

    def record(self, kind: str, name: str) -> dict[str, Any]:
        """A record of `kind` (DONE, BEGUN, FAILED); empty when missing or damaged."""
        try:
            value = json.loads(self._path(kind, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def records(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(item, record) of every record of `kind`."""
        for name in sorted(self._names(kind)):
            yield name, self.record(kind, name)

    def count(self, kind: str) -> int:
        return len(self._names(kind))

    def note(self, reason: str, command: str = "") -> None:
        """Leave word that the next wave was not submitted, why, and what to type; "" removes it."""
        path = self.root / STOPPED
        if reason:
            write_text(path, json.dumps({"reason": reason, "command": command}, indent=1) + "\n")
        else:
            path.unlink(missing_ok=True)

    def stop_file(self) -> Path | None:
        """The STOP file of the run or of this task, where somebody has made one."""
        places = (self.root / STOP, self.root.parent.parent / STOP)
        return next((path for path in places if path.exists()), None)

    def begin(self, item: Item, wave: Wave) -> None:
        """Write that the item is started now."""
        tries = self._tries(item.name, wave.submission)
        if wave.number not in tries:
            self._write(
                BEGUN,
                item.name,
                {"submission": wave.submission, "waves": [*tries, wave.number]},
            )

    def tries(self, item: Item, submission: int) -> int:
        """Waves of a submission that have started the item, which has not ended well since."""
        return len(self._tries(item.name, submission))

    def end(self, item: Item, wave: Wave, code: int, facts: Mapping[str, Any]) -> bool:
        """Write how the item ended; returns whether that is a success."""
        value = {"item": item.name, "words": list(item.words), "stamp": item.stamp, "code": code}
        value |= {"submission": wave.submission, "wave": wave.number, **facts}
        if code not in item.accepted:
            self._write(FAILED, item.name, value)
            return False
        self._write(DONE, item.name, value)
        for kind in (FAILED, BEGUN):
            self._path(kind, item.name).unlink(missing_ok=True)
        return True

    def _tries(self, name: str, submission: int) -> list[int]:
        record = self.record(BEGUN, name)
        waves = record.get("waves")
        if record.get("submission") != submission or not isinstance(waves, list):
            return []
        return [number for number in waves if isinstance(number, int)]

    def _path(self, kind: str, name: str) -> Path:
        return self.root / kind / f"{name}.json"

    def _names(self, kind: str) -> set[str]:
        try:
            entries = os.listdir(self.root / kind)
        except FileNotFoundError:
            return set()
        return {name.removesuffix(".json") for name in entries if name.endswith(".json")}

    def _write(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        if kind not in self._made:
            (self.root / kind).mkdir(parents=True, exist_ok=True)
            self._made.add(kind)
        # Aside under a name of its own: an orphan of a lost node may write the same record.
        path = self._path(kind, name)
        aside = path.with_name(f"{name}.{socket.gethostname()}.{os.getpid()}")
        write_text(aside, json.dumps({"format": _FORMAT, **value}) + "\n")
        os.replace(aside, path)


def group(items: Sequence[Item], per_element: int) -> list[tuple[Item, ...]]:
    """Items in order, `per_element` to an element."""
    return [tuple(items[n : n + per_element]) for n in range(0, len(items), per_element)]


def stamp(paths: Iterable[Path]) -> str:
    """Digest of the names, sizes and times of change of files; missing ones count as such."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = path.stat()
            facts = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            facts = "missing"
        digest.update(f"{path}\0{facts}\n".encode())
    return digest.hexdigest()[:16]
