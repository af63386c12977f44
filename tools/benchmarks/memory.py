"""Peak memory of this process on a CPU, which keeps no count of its tensors."""

import resource
from pathlib import Path


def reset_peak() -> None:
    """Forget the peak so far, where the kernel allows it (Linux, own process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_gb() -> float:
    """Largest resident size since `reset_peak`, 10^9 bytes."""
    return _status("VmHWM")


def resident_gb() -> float:
    """Resident size now, 10^9 bytes."""
    return _status("VmRSS")
