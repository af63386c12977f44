"""Every fault on a pipeline of its own, compared with an undisturbed one.

    python -m tests.faults.run [SCENARIO ...] [--root DIR] [--table FILE]

Starts a throw-away Slurm with accounting. Prints a table; the exit code tells whether every run
ended with the very same weights and losses. `--table` writes it as Markdown as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.pipeline_run import Ended, PipelineRun
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.world import World
from tests.pipeline.small_run import REPOSITORY
from tests.slurm.throwaway import ThrowAwaySlurm

COLUMNS = ("scenario", "what happens", "jobs", "Slurm restarts", "starts", "seconds", "identical")


def undisturbed(world: World, slurm: ThrowAwaySlurm, *overrides: str) -> Ended:
    """What every other run is compared with."""
    run = PipelineRun(world, "undisturbed", slurm, *overrides)
    run.submit()
    return run.until_over()


def disturbed(world: World, slurm: ThrowAwaySlurm, scenario: Scenario, *overrides: str) -> Ended:
    """The same pipeline with one fault."""
    name = scenario.name.replace("_", "-")
    run = PipelineRun(world, name, slurm, *scenario.overrides, *overrides)
    run.submit()
    scenario.fault(run, scenario.stage)
    return run.until_over()


def row(name: str, title: str, ended: Ended, reference: Ended) -> tuple[str, ...]:
    """One line of the table."""
    same = ended.weights == reference.weights and ended.losses == reference.losses
    numbers = (ended.jobs, ended.restarts, ended.attempts, round(ended.seconds))
    return (name, title, *map(str, numbers), "yes" if same else "NO")


def markdown(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """The table with when, where and of which commit."""
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False)
    yield "# Faults\n"
    yield (
        f"`python -m tests.faults.run`, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}, "
        f"{version.stdout.strip()}, {os.cpu_count()} x {platform.machine()}, Python "
        f"{platform.python_version()}. Each run is three stages of 18 steps on two nodes and an "
        "export; `identical` compares SHA-256 of the exported weights and the loss of every step.\n"
    )
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    yield from (f"| {' | '.join(one)} |" for one in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO")
    parser.add_argument("--root", type=Path, help="where the runs stay (default: a temporary one)")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.scenario) - set(SCENARIOS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: the scenarios are {', '.join(SCENARIOS)}")
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        world = World((arguments.root or Path(temporary)).resolve())
        with ThrowAwaySlurm(accounting=True) as slurm:
            reference = undisturbed(world, slurm, *arguments.set)
            rows = [row("undisturbed", "nothing", reference, reference)]
            print(*rows[0], sep="  ", flush=True)
            for name in arguments.scenario or SCENARIOS:
                scenario = SCENARIOS[name]
                try:
                    ended = disturbed(world, slurm, scenario, *arguments.set)
                    rows.append(row(name, scenario.title, ended, reference))
                except AssertionError as error:
                    print(error, file=sys.stderr, flush=True)
                    rows.append((name, scenario.title, "", "", "", "", "FAILED"))
                print(*rows[-1], sep="  ", flush=True)
                if arguments.table is not None:
                    arguments.table.write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")
                slurm.clean()
    return 0 if all(one[-1] == "yes" for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
