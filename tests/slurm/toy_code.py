"""A repository whose training takes no time: what a run snapshots in tests of real batch jobs.

`conf/` and `slurm/` are the real ones; the programs that the ranks run are a few lines without
torch. What each start of a stage's ranks does is one word of a line of RUN/STAGE.does: `done`,
`stop` (one step, saved, 143), `fail` (exit code 7), `hang`; `done` when there are no more.
"""

from __future__ import annotations

import shutil
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

TRAIN = """
import hashlib, json, os, pathlib, sys, time
config = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
stage, rank = config.parent, int(os.environ["RANK"])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "STOP_AFTER_SECONDS")
place = {name: os.environ[name] for name in names}
place |= {"node": os.environ["SLURMD_NODENAME"], "file": __file__, "cwd": os.getcwd()}
(stage / f"rank_{rank}.json").write_text(json.dumps(place))
starts = stage / "starts"
does = stage.parent / (stage.name + ".does")
words = does.read_text().split() if does.exists() else []
number = int(starts.read_text()) if starts.exists() else 0
word = words[number] if number < len(words) else "done"
if rank:
    time.sleep(0.5)  # rank 0 decides
    sys.exit({"stop": 143, "fail": 7}.get(word, 0))
time.sleep(0.2)
starts.write_text(str(number + 1))
print(f"step {number + 1} {word}\\n", end="", flush=True)  # one write: srun labels each
if word == "hang":
    time.sleep(600)
if word == "fail":
    print("error: the data is torn; build it again", flush=True)
    sys.exit(7)
with open(stage / "metrics.jsonl", "a") as metrics:
    metrics.write(json.dumps({"step": number + 1, "seconds": 1.0, "loss": 1.0}) + "\\n")
checkpoint = stage / "checkpoints" / f"step_{number + 1:08d}"
checkpoint.mkdir(parents=True)
manifest = checkpoint / "MANIFEST.json"
manifest.write_text(json.dumps({"files": {}, "step": number + 1}))
if word == "stop":
    sys.exit(143)
done = {"format": 1, "checkpoint": f"checkpoints/{checkpoint.name}"}
done["checkpoint_digest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
(stage / "DONE.json").write_text(json.dumps(done))
"""
EXPORT = """
import pathlib, sys
words = dict(word.split("=", 1) for word in sys.argv[1:])
assert (pathlib.Path(words["stage"]) / "DONE.json").exists()
pathlib.Path(words["out"]).mkdir()
"""


def write(root: Path) -> Path:
    """The toy repository below `root`; returns `root`."""
    for package in ("conf", "slurm"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, root / package, ignore=ignore)
    programs = {
        "pipeline/train.py": TRAIN,
        "pipeline/preflight.py": "",
        "tools/hf_export.py": EXPORT,
    }
    for name, text in programs.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
        (root / name).with_name("__init__.py").touch()
    return root
