"""The batch scripts of every profile, as `DRY=1` writes them.

    python -m tests.slurm.golden     # write them anew; then read the difference

What differs between machines stands as /project (the directory of the command, the runs and the
Python). Scripts are of a first submission of the whole pipeline.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from slurm import arrays, submit

DIRECTORY = Path(__file__).resolve().parent
PROJECT = "/project"
# The account is anybody's; the shape of `slurm`'s nodes would be asked of a Slurm.
REAL = ("model=amalia_vl_9b", "data=amalia", "cluster.account=project42")
CLUSTERS = {
    "mn5": (*REAL, "cluster.qos=acc_ehpc"),
    "deucalion": REAL,
    "leonardo": REAL,
    "jupiter": REAL,
    "slurm": (
        "model=tiny",
        "data=demo",
        "cluster.detect=false",
        "cluster.cpus_per_node=8",
        "cluster.memory_gb=11",
    ),
}
SCRIPTS = {
    "stage1": "stage1/segments/001",
    "stage2": "stage2/segments/001",
    "stage3": "stage3/segments/001",
    "verify": "stage1/verify/001",
    "export": "export/001",
    "array": "arrays/commands/001",
}
ITEMS, THROTTLE = 300, 8  # of the array


def written(cluster: str, directory: Path) -> dict[str, str]:
    """The scripts that the command writes below `directory`, by their names in this folder."""
    shared = ["run=first", "runs_dir=runs", "dry=true", f"cluster={cluster}", *CLUSTERS[cluster]]
    shared.append(f"cluster.python={directory}/env/bin/python")
    lines = [f"item{number:03d} true\n" for number in range(ITEMS)]
    (directory / "commands.txt").write_text("".join(lines), encoding="utf-8")
    array = ["task=commands", "file=commands.txt", f"throttle={THROTTLE}", f"elements={ITEMS}"]
    said = io.StringIO()
    with _inside(directory), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        codes = (
            submit.main(["stages=[stage1,stage2,stage3]", "export=true", *shared]),
            arrays.main([*array, *shared]),
        )
    assert codes == (0, 0), said.getvalue()
    return {
        f"{cluster}_{name}.sh": _anywhere(directory / "runs/first" / folder, directory)
        for name, folder in SCRIPTS.items()
    }


def recorded(cluster: str) -> dict[str, str]:
    """The same from this folder."""
    paths = sorted(DIRECTORY.glob(f"{cluster}_*.sh"))
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def _anywhere(folder: Path, directory: Path) -> str:
    text = (folder / "submit.sh").read_text(encoding="utf-8")
    return text.replace(str(directory), PROJECT)


@contextlib.contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(directory)
    for name in ("SLURM_ACCOUNT", "SLURM_QOS"):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
