"""One rank of a profile: `python -m tools.profile_rank --config FILE [wait=1 warmup=1 active=2]`.

Trains the first steps of a stage as `pipeline.train` does, from the same weights, under torch's
profiler, and keeps nothing but the profile. Started by tools.profile_run, or by srun.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from conf.check import check
from conf.compose import load
from conf.schema import Config
from tools.command import run as run_command
from tools.command import split_arguments

PROFILE = "profile"  # folder of the run
STEPS = ("wait", "warmup", "active")


def directory(config: Config) -> Path:
    """Where the profile of this stage is written."""
    return Path(config.runs_dir) / config.run / PROFILE / config.stage.name


def predecessor(config: Config) -> Path:
    """The stage whose weights training would begin from."""
    if config.init_from:
        return Path(config.init_from)
    number, run = config.stage.number, Path(config.runs_dir) / config.run
    return run / ("import" if number == 1 else f"stage{number - 1}")


def chosen_ranks(text: str, world_size: int) -> set[int]:
    """`all` or `0,8` as ranks; ValueError for anything else, and for ranks that are not there."""
    if text == "all":
        return set(range(world_size))
    try:
        ranks = {int(word) for word in text.split(",")}
    except ValueError:
        ranks = {-1}
    if not ranks <= set(range(world_size)):
        raise ValueError(
            f"ranks={text} is neither `all` nor numbers like 0,8 below parallel.world_size="
            f"{world_size}"
        )
    return ranks


def profile(config: Config, words: dict[str, str]) -> None:
    """Run the steps and write the profile.

    Raises:
        ValueError: steps that the stage does not have, or whatever keeps it from training.
    """
    # Imported here: what is wrong with the words is said before torch is there.
    from pipeline.callbacks.profile import Profile, Steps
    from pipeline.callbacks.progress import Progress
    from pipeline.callbacks.throughput import Throughput
    from pipeline.data import open_data
    from pipeline.distributed import session
    from pipeline.handoff import DONE
    from pipeline.hardware import detect
    from pipeline.model import build_training_model
    from pipeline.objectives.base import Objective
    from pipeline.objectives.preference import PreferenceObjective
    from pipeline.objectives.sft import SupervisedObjective
    from pipeline.trainer import Trainer

    class Rehearsal(Trainer):
        """A trainer whose stage is never done."""

        def _finish(self) -> None:
            pass

    given = {name: _number(words[name], name) for name in STEPS if name in words}
    steps = replace(Steps(), **given)
    steps.check()
    recorded = chosen_ranks(words.get("ranks", "all"), config.parallel.world_size)
    source = predecessor(config)
    config = replace(config, init_from=str(source))
    check(config, detect())
    with session(config.parallel, config.stage.seed) as ranks:
        # A profile leaves the stage's directory as it is.
        data = open_data(config, ranks, plans_in=directory(config))
        if data.steps < steps.total:
            raise ValueError(
                f"{config.stage.name} has {data.steps} steps, the profile wants {steps.total}; "
                "lower wait=, warmup= or active="
            )
        data = replace(data, plan=replace(data.plan, steps=steps.total))
        trainer = Rehearsal(config, ranks, data, build_training_model(config), directory(config))
        if (source / DONE).is_file():
            trainer.load_predecessor()
        else:
            trainer.say(f"{source} is not done: the profile is of random weights")
        objective: Objective = SupervisedObjective(ranks.context, ranks.context_size)
        if config.stage.objective == "dpo":
            # Time does not depend on the reference's numbers, and nobody waits for its pass.
            nothing = {(int(which), int(row)): (0.0, 0.0) for which, row in data.plan.samples}
            objective = PreferenceObjective(
                config.stage.preference.beta, nothing, ranks.context, ranks.context_size
            )
        trainer.fit(
            objective,
            [
                Profile(directory(config), steps, recorded),
                Progress(1, Throughput(config), seconds=0.0),
            ],
        )


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text} is no number of steps") from None


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="resolved YAML of one stage")
    parser.add_argument("words", nargs="*", help="wait=1 warmup=1 active=2 ranks=all")
    given = parser.parse_args(arguments)
    words, rest = split_arguments(given.words, (*STEPS, "ranks"))
    if rest:
        raise ValueError(f"{rest[0]} is not known here; the configuration is in {given.config}")
    profile(load(given.config), words)


if __name__ == "__main__":
    sys.exit(run_command(main))
