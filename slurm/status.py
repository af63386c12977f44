"""Where a run is: its stages, jobs, arrays, and what they have used.

    python -m slurm.status run=NAME [runs_dir=runs] [refresh=true] [all=true] [json=true]

One squeue and at most one sacct, kept for a minute in the run directory; without accounting, or
without any Slurm, the run's own files say what they can. Without run= every run in one line, and
Slurm is not asked.

    refresh=true    ask Slurm again, however fresh its last answer is
    all=true        ended jobs too
    json=true       for programs
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm import arguments as words
from slurm import command_line
from slurm.run_state import run_state
from slurm.status_text import as_json, line, text

KNOWN = {"run": "", "runs_dir": words.RUNS, "refresh": "", "all": "", "json": ""}


def status(arguments: Sequence[str]) -> str:
    """The report. Raises ConfigError on a run that does not exist or an unknown word."""
    values = words.parse(arguments, KNOWN)
    as_values = words.boolean(values, "json")
    if not values["run"]:
        runs = Path(values["runs_dir"])
        states = [run_state(runs / name, ask=False) for name in words.run_names(runs)]
        if as_values:
            return json.dumps([as_json(state) for state in states], indent=1)
        return "\n".join(line(state) for state in states) or f"no runs in {runs}"
    state = run_state(words.run_directory(values), words.boolean(values, "refresh"))
    if as_values:
        return json.dumps(as_json(state), indent=1)
    return text(state, words.boolean(values, "all"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(
        lambda given: print(status(given)), arguments, __doc__, needs_words=False
    )


if __name__ == "__main__":
    sys.exit(main())
