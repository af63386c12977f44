"""The first step of a job, once a rank: exit code 0 when training may start.

    python -m pipeline.preflight --config runs/NAME/stage1/config.yaml --report DIR

Each rank writes DIR/rank_N.json; nodes that are to blame stand in DIR/bad_nodes.json. One line on
stderr names node and cause. It ends by itself within some minutes, whatever hangs.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.compose import load
from conf.schema import Config
from pipeline.preflight.report import Problem, RankReport

MEET_SECONDS = 180.0  # a first import from a cold parallel file system takes minutes
LAST_SECONDS = 240.0  # for all that comes after the rendezvous


def run(config: Config, report: RankReport, seconds: float = MEET_SECONDS) -> int:
    """Every phase on this rank, which waits `seconds` for the others; 0 when all have passed."""
    report.write()
    _end_after(seconds + LAST_SECONDS, report)
    try:
        _alone(config, report)
    except Problem as problem:
        report.failed(problem)
    from pipeline.preflight.together import together

    try:
        return together(config, report, seconds)
    except Problem as problem:
        if report.problem is None:
            report.failed(problem)
        report.tell()
        return 1


def _alone(config: Config, report: RankReport) -> None:
    """Phases that need no other rank. Raises Problem at the first that fails."""
    from pipeline.preflight import node

    stage_dir = Path(config.runs_dir) / config.run / config.stage.name
    phases: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("device", lambda: node.device(config, report.local_rank))
    ]
    if report.leads:  # once a node is enough for these
        phases += [
            ("disk", lambda: node.disk(config, stage_dir, report.rank)),
            ("snapshot", lambda: node.snapshot(stage_dir.parent)),
            ("data", lambda: node.data(config)),
            ("versions", lambda: {"versions": node.versions()}),
        ]
    for name, check in phases:
        report.passed(name, check())


def _end_after(seconds: float, report: RankReport) -> None:
    """End this process when its time is over, also while it hangs in a driver or a collective."""

    def expire() -> None:
        problem = f"no end of preflight after {seconds:.0f} s; phase {report.phase!r} was the last"
        report.failed(Problem(problem))
        report.tell()
        os._exit(1)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.preflight", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="resolved YAML of one stage")
    parser.add_argument("--report", required=True, type=Path, help="folder for what is found")
    given = parser.parse_args(arguments)
    # Errors of NCCL are to be raised here, not to abort the process.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        return run(load(given.config), RankReport.of_environment(given.report))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
