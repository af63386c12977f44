"""Profile some steps of a stage with torch's profiler, into runs/RUN/profile/STAGE.

    python -m tools.profile_run run=demo stage=stage2 [wait=1 warmup=1 active=2 ranks=all]
        [model=tiny data=demo parallel=dp2 ...]

A stage that was started is profiled as it is configured; with further words (`parallel=dp2`) the
configuration is composed as `make stage2` would. Nothing of the run is touched: weights come from
the stage before (random ones where it is not done), and no checkpoint, metric or DONE.json is
written. Here the ranks start at once; for a Slurm cluster the srun line is printed, to be run
inside an allocation.

    wait, warmup, active   steps without the profiler, with it but not kept, and kept
    ranks                  which ranks record: `all`, or some: `ranks=0,8`
"""

import sys
from pathlib import Path

from conf.compose import compose, dump, load
from conf.schema import Config
from pipeline.files import write_atomically
from tools.command import run, split_arguments
from tools.profile_rank import chosen_ranks, directory

USAGE = "python -m tools.profile_run run=NAME stage=stage2 [active=2] [ranks=all] [parallel=...]"
OURS = ("run", "stage", "runs_dir", "model", "data", "wait", "warmup", "active", "ranks")
SHOWN = 14  # lines of the table on the terminal


def configuration(words: dict[str, str], overrides: list[str]) -> Config:
    """That of the stage as it was started, or composed from the words."""
    started = Path(words.get("runs_dir", "runs")) / words["run"] / words["stage"] / "config.yaml"
    if started.is_file() and not overrides:
        print(f"as in {started}")
        return load(started)
    named = [f"{key}={words[key]}" for key in OURS[:5] if key in words]
    return compose([*named, *overrides])


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    words, overrides = split_arguments(arguments, OURS)
    if not words.get("run") or not words.get("stage"):
        raise ValueError(f"run= or stage= is missing; usage: {USAGE}")
    config = configuration(words, overrides)
    recorded = chosen_ranks(words.get("ranks", "all"), config.parallel.world_size)
    folder = directory(config)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("rank_*"), *folder.glob(".partial_*")]:
        old.unlink()
    path = folder / "config.yaml"
    write_atomically(path, dump(config).encode())
    steps = [f"{key}={words[key]}" for key in OURS[5:] if key in words]
    command = ["tools.profile_rank", "--config", str(path.resolve()), *steps]
    if config.cluster.executor == "slurm":
        from slurm import bodies
        from slurm.render import rank_command

        print("inside an allocation (salloc) of this shape:\n")
        print(f"{bodies.master(config)}export MASTER_PORT=29500\n{rank_command(config, command)}")
        return
    _run_here(config, path, command)
    table = (folder / f"rank_{min(recorded)}.txt").read_text(encoding="utf-8")
    print("\n".join(table.splitlines()[:SHOWN]))
    print(f"profiles: {folder}; open a trace in https://ui.perfetto.dev or chrome://tracing")


def _run_here(config: Config, path: Path, command: list[str]) -> None:
    """Start the ranks; ValueError naming the first failure."""
    from slurm import local

    local.refuse_too_many(config)
    try:
        local.run(config, path, path.parent, program=[sys.executable, "-m", *command])
    except local.JobFailed as error:
        raise ValueError(str(error)) from None


if __name__ == "__main__":
    sys.exit(run(main))
