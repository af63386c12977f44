"""Build and step every rank of a layout on this machine, without memory or network.

    python -m tools.dry_run model=amalia_vl_9b data=amalia cluster=mn5 [stages=[stage1,stage2]]
        [ranks=sample|all|0,1,64] [steps=1] [jobs=2] [KEY=VALUE]

Each simulated rank is the true model, optimizer, schedule and checkpoint of that rank; tensors have
shapes and no numbers, process groups write down what they are asked (docs/dry_run.md). Printed are
parameters, bytes and collectives; the status is 1, and the reason printed, where ranks' calls do
not fit together, a shape does not, the checkpoint misses or doubles a tensor, or something trains
that should not.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING

from conf.check import check
from conf.compose import options
from conf.schema import Config
from conf.schema.errors import ConfigError, refuse
from pipeline.stages import trainable_modules
from slurm.request import parse
from tools.command import run, split_arguments
from tools.dryrun import sample as samples
from tools.dryrun.page import page, problems

if TYPE_CHECKING:
    from tools.dryrun.report import RankReport

# (configuration, ranks, optimizer steps) -> what was seen of each rank
Simulate = Callable[[Config, Sequence[int], int], list["RankReport"]]
MOST_SHOWN = 12  # of the things that are wrong with a stage


def local_layers(config: Config) -> tuple[Config, list[str]]:
    """The configuration as it can be built without a GPU, and what differs from the job."""
    remarks = ["layers: Megatron's local ones; Transformer Engine's cannot be built without a GPU"]
    precision, parallel = config.precision, config.parallel
    if precision.fp8_recipe is not None:
        remarks.append(
            f"precision: BF16 instead of FP8 ({precision.fp8_recipe}), as that needs one"
        )
        precision = dataclasses.replace(
            precision,
            fp8_recipe=None,
            fp8_params=False,
            fp8_first_layers_bf16=0,
            fp8_last_layers_bf16=0,
        )
    if parallel.optimizer_states != "fp32" or parallel.optimizer_offload:
        remarks.append("optimizer: FP32 states on the GPU instead of BF16 or offloaded ones")
        parallel = dataclasses.replace(parallel, optimizer_states="fp32", optimizer_offload=0.0)
    return dataclasses.replace(config, precision=precision, parallel=parallel), remarks


def _simulate(config: Config, rank: int, steps: int) -> "RankReport":
    from tools.dryrun.rank import simulate

    return simulate(config, rank, steps)


@contextmanager
def simulator(jobs: int) -> Iterator[Simulate]:
    """Simulates ranks in `jobs` processes, or with 0 in this one."""
    # Before torch is imported: a GPU would change which layers are built.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    if jobs == 0:
        yield lambda config, ranks, steps: [_simulate(config, rank, steps) for rank in ranks]
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield lambda config, ranks, steps: list(
            pool.map(_simulate, [config] * len(ranks), ranks, [steps] * len(ranks))
        )


def once(simulate: Simulate) -> Simulate:
    """Ranks that take no step are simulated once for all stages that build and freeze alike."""
    known: dict[str, list[RankReport]] = {}

    def remembering(config: Config, ranks: Sequence[int], steps: int) -> "list[RankReport]":
        trained = sorted(trainable_modules(config.stage.lr))
        key = repr((config.model, config.parallel, config.precision, trained, ranks))
        if steps or key not in known:
            reports = simulate(config, ranks, steps)
            if steps:
                return reports
            known[key] = reports
        return known[key]

    return remembering


def dry_run(config: Config, wanted: str, steps: int, simulate: Simulate) -> list[str]:
    """Simulate one stage and print its page; returns what is wrong, in one line each."""
    config, remarks = local_layers(config)
    sample = samples.choose(config.parallel, wanted)
    started = time.perf_counter()
    reports = simulate(config, sample.ranks, steps)
    failed = any(report.error for report in reports)
    writers = [] if failed else simulate(config, sample.writers, 0)
    seconds = time.perf_counter() - started
    found = problems(reports, writers, sample.whole_checkpoint)
    if not any(report.error for report in (*reports, *writers)):
        for line in page(config, sample, reports, writers, remarks):
            print(line)
    for problem in found[:MOST_SHOWN]:
        print(f"  WRONG: {problem}")
    if len(found) > MOST_SHOWN:
        print(f"  WRONG: and {len(found) - MOST_SHOWN} things more")
    verdict = "this would not run" if found else "everything fits together"
    print(f"{config.stage.name}: {verdict} ({seconds:.0f} s)\n", flush=True)
    return found


def main(arguments: list[str]) -> None:
    """The command. Raises ConfigError with everything that was found."""
    ours, overrides = split_arguments(arguments, ("ranks", "jobs", "steps"))
    if not any(word.startswith(("stages=", "stage=")) for word in overrides):
        overrides.append(f"stages=[{','.join(options('stage'))}]")
    request = parse(overrides)
    jobs = _number(ours, "jobs", min(2, os.cpu_count() or 1), least=0)
    steps = _number(ours, "steps", 1, least=1)
    configs = [request.compose(stage) for stage in request.stages]
    reasons: dict[str, list[str]] = {}
    for config in configs:
        try:
            check(config, dry=True)
        except ConfigError as error:
            reasons.setdefault(str(error), []).append(config.stage.name)
    refuse([f"{', '.join(stages)}: {reason}" for reason, stages in reasons.items()])
    wrong: list[str] = []
    with simulator(jobs) as simulate:
        simulate = once(simulate)
        for config in configs:
            found = dry_run(config, ours.get("ranks", "sample"), steps, simulate)
            if found:
                wrong.append(f"{config.stage.name}: {len(found)} wrong, first: {found[0]}")
    refuse(wrong)


def _number(ours: dict[str, str], name: str, default: int, least: int) -> int:
    value = ours.get(name, str(default))
    if not value.isdigit() or int(value) < least:
        raise ConfigError(f"{name}={value} is not a whole number of at least {least}")
    return int(value)


if __name__ == "__main__":
    sys.exit(run(main))
