"""Steer a run whose jobs may be somebody else's, by files in its directory.

python -m slurm.steer run=NAME save|exit|stop|go [stage=stage2] [runs_dir=runs]

save    the stage that trains saves after the step in progress
exit    it saves and its segment ends; the next segment goes on
stop    it saves and ends, and nothing of the run (or of stage=) starts until `go`
go      removes what the three above have left
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from conf.schema.errors import ConfigError
from slurm import arguments as words
from slurm import attempts, command_line
from slurm.verify import DONE, STOP

SAVE, EXIT = "SAVE", "EXIT"
KNOWN = {"run": "", "runs_dir": words.RUNS, "stage": ""}
ACTIONS = ("save", "exit", "stop", "go")


def steer(root: Path, action: str, stage: str = "") -> list[str]:
    """Do it; returns a line for each file written or removed.

    Raises ConfigError where there is nothing to steer, OSError where one may not write.
    """
    if action == "go":
        below = [*root.glob("stage[0-9]*"), *root.glob("arrays/*")]
        places = [root / stage] if stage else [root, *sorted(below)]
        paths = [place / name for place in places for name in (STOP, EXIT, SAVE)]
        gone = [path for path in paths if path.exists()]
        for path in gone:
            path.unlink(missing_ok=True)
        return [f"removed {path}" for path in gone] or ["no such file was there"]
    if action == "stop":
        path = root / stage / STOP
        touch(path)
        return [f"{path} written: what trains saves and ends, nothing starts until it is removed"]
    directory = root / stage if stage else _training(root)
    path = directory / (SAVE if action == "save" else EXIT)
    touch(path)
    what = "saves" if action == "save" else "saves and ends its segment"
    return [f"{path} written: {directory.name} {what} after the step in progress"]


def touch(path: Path) -> None:
    """Make an empty file that whoever runs the job may remove."""
    path.touch(exist_ok=True)


def _training(root: Path) -> Path:
    """The stage that was started last and is not done."""
    begun = [
        (past[-1].started, directory)
        for directory in root.glob("stage[0-9]*")
        if not (directory / DONE).exists() and (past := attempts.read(directory))
    ]
    if not begun:
        raise ConfigError(f"no stage of {root} is training; name one with stage=")
    return max(begun)[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(_command, arguments, __doc__)


def _command(given: list[str]) -> None:
    actions = [word for word in given if word in ACTIONS]
    values = words.parse([word for word in given if word not in ACTIONS], KNOWN)
    if len(actions) != 1:
        raise ConfigError(f"say what to do: one of {', '.join(ACTIONS)}")
    root = words.run_directory(values)
    words.check_stage(root, values["stage"])
    print("\n".join(steer(root, actions[0], values["stage"])))


if __name__ == "__main__":
    sys.exit(main())
