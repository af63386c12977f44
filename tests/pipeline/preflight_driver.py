"""One rank of preflight with something wrong: `python -m ... FAULT --config C --report R`.

The faults stand in for another machine; what is checked, compared and reported is the real code.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.preflight import __main__ as preflight
from pipeline.preflight import bandwidth, meeting, node


def other_version() -> None:
    real = node.versions
    node.versions = lambda: {**real(), "torch": "2.0.0"}


def other_kernel() -> None:
    real = node.versions
    node.versions = lambda: {**real(), "kernel": "3.10"}


def clock_ahead() -> None:
    """The clock of this rank's answers; the module sees another `time`."""
    real = time.time

    class Ahead:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def time(self) -> float:
            return real() + 60.0

    meeting.time = Ahead()  # type: ignore[assignment]


def bad_multiplication() -> None:
    real = node._multiply

    def wrong(where: Any) -> None:
        torch = sys.modules["torch"]
        equal, torch.equal = torch.equal, lambda *_: False  # type: ignore[attr-defined]
        try:
            real(where)
        finally:
            torch.equal = equal  # type: ignore[attr-defined]

    node._multiply = wrong


def wrong_sum() -> None:
    """This rank puts one too many into the all-reduce."""
    import torch

    real = torch.full
    bandwidth.torch.full = lambda size, value, **k: real(size, value + 1, **k)  # type: ignore


def hangs() -> None:
    """Does not come to the rendezvous, as a node whose file system hangs."""
    time.sleep(3600)


def dies() -> None:
    os._exit(7)


FAULTS = {f.__name__: f for f in (other_version, other_kernel, clock_ahead, bad_multiplication)}
FAULTS |= {f.__name__: f for f in (wrong_sum, hangs, dies)}


def main() -> int:
    fault, config, report = sys.argv[1], sys.argv[3], Path(sys.argv[5])
    preflight.MEET_SECONDS = float(os.environ["MEET_SECONDS"])
    preflight.run.__defaults__ = (preflight.MEET_SECONDS,)
    meeting.PATIENCE_SECONDS = 3.0
    if fault != "none":
        FAULTS[fault]()
    return preflight.main(["--config", config, "--report", str(report)])


if __name__ == "__main__":
    sys.exit(main())
