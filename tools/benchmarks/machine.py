"""Where and when something was measured, and whether the machine had other work meanwhile."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy")
# Share of the processors taken by others above which a time is not to be quoted.
MOST_OTHERS = 0.1
_TICKS = os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """Python and the packages that decide speed; those not installed are left out."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: Path = REPOSITORY) -> str:
    """The commit that is checked out, "and changes" where files differ; "unknown" without git."""
    command = ["git", "-C", str(directory)]
    try:
        head = subprocess.run(
            [*command, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        # Tables written by earlier benchmarks do not change what is measured.
        changed = subprocess.run(
            [*command, "status", "--porcelain", "-uno", "--", ".", ":!docs"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" and changes" if changed.stdout.strip() else "")


def processor() -> str:
    """Model name of the CPU, and how many of its cores this machine has."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{os.cpu_count()} cores of {name}"


def memory_gb() -> float:
    """Main memory, 10^9 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _program() -> list[str]:
    """`-m tools.bench` for a module of this repository, wherever that lies."""
    path = Path(sys.argv[0]).resolve()
    if not path.is_relative_to(REPOSITORY):
        return [path.name]
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return ["-m", name.removesuffix(".__main__")]


def facts(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What belongs beside every figure, ready for JSON."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "command": " ".join(command or ["python", *_program(), *sys.argv[1:]]),
        "hardware": f"{processor()}, {memory_gb():.0f} GB",
        "versions": versions(),
    }


def parse_cpu_times(stat: str) -> tuple[float, float]:
    """(seconds in use, seconds in all) of all processors since boot, from /proc/stat.

    Time stolen by the hypervisor counts as in use: it is somebody's, and not ours.
    """
    values = [int(word) / _TICKS for word in stat.splitlines()[0].split()[1:9]]
    idle = values[3] + values[4]  # idle, iowait
    return sum(values) - idle, sum(values)


@dataclass
class OtherWork:
    """How much of the processors others took between `start` and `stop`.

    `os.getloadavg` lags by a minute and counts ourselves; this is the measured share.
    """

    _before: tuple[float, float, float] | None = None
    shares: list[float] = field(default_factory=list)

    def start(self, ours: float) -> None:
        """`ours`: CPU seconds used so far by the processes that are measured."""
        self._before = (*self._now(), ours)

    def stop(self, ours: float) -> float | None:
        """Share of all processors that others took; None where /proc/stat cannot be read."""
        assert self._before is not None
        used, whole = self._now()
        passed = whole - self._before[1]
        if passed <= 0:
            return None
        others = (used - self._before[0]) - (ours - self._before[2])
        self.shares.append(max(0.0, others / passed))
        return self.shares[-1]

    @staticmethod
    def _now() -> tuple[float, float]:
        try:
            return parse_cpu_times(Path("/proc/stat").read_text(encoding="ascii"))
        except (OSError, ValueError, IndexError):
            return 0.0, 0.0


def disturbed(others: float | None) -> str:
    """A sentence for the table where a time cannot be trusted, else an empty string."""
    if others is None:
        return "Not known whether the machine had other work meanwhile."
    if others <= MOST_OTHERS:
        return ""
    return (
        f"**Not to be quoted**: other programs took {100 * others:.0f} % of the processors "
        "meanwhile; measure again on a quiet machine."
    )
