"""How long the plan of a run takes, and how much memory: with a million samples and with ten."""

import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.manifest import Manifest, read_manifest
from data_shards.plan import Plan
from data_shards.plan_file import ensure_plan, plan_folder, read_plan
from models.anyres import AnyresGeometry
from tools.benchmarks import machine
from tools.benchmarks.data.packing import LAWS, MIXED, SETS, mixture, stage2, write_manifests
from tools.benchmarks.memory import peak_gb
from tools.benchmarks.table import Section

SAMPLES = (1_000_000, 10_000_000)
GOAL_SAMPLES, GOAL_SECONDS, GOAL_GIB = 100_000_000, 600.0, 4.0
LINEAR = 1.3  # times the cost of a sample that ten times as many may have
STEPS_READ = 200
METHOD = """
The plan of one epoch of four data sets, mixed by weights, packed to 16,384 tokens with the settings
of conf/stage/stage2.yaml, in a process of its own on one core: manifests opened, every column of
theirs checked (SHA-256 and row by row), samples drawn and packed, the plan written, all flushed to
disk. CPU seconds (user and system). *memory*: peak resident size, Python and NumPy (about 0.1 GiB)
and mapped pages of files included; *open*: reading all four manifests; *again*: opening the
finished plan as rank 0 does on resume (every column's SHA-256) and as the other ranks do.

*shards a step*, *in 100 steps*: different shards that the samples of a step of 128 packs, and of
100 steps in a row, lie in; beside it what shuffling all shards together would ask for.
"""


def _plan(pipe: Connection, folder: Path, root: Path) -> None:
    """One plan in a fresh process; sends what it took."""
    config = stage2()
    stage = replace(config.stage, steps=None, epochs=1.0)
    data = mixture(SETS[MIXED])
    started, cpu = time.monotonic(), _cpu()
    manifests = {name: read_manifest(folder / name / "manifest.parquet") for name in LAWS}
    opened = time.monotonic() - started
    for manifest in manifests.values():
        manifest.verify_index()
    checked = _cpu() - cpu
    began, started = _cpu(), time.monotonic()
    plan = ensure_plan("training", root, manifests, data, stage)
    # ensure_plan checks the manifests as well: once is what a run pays.
    seconds, wall = _cpu() - began, time.monotonic() - started
    memory = peak_gb() * 1e9 / 2**30
    place = plan_folder(root, plan.inputs)
    again = []
    for verify in (True, False):
        started = time.monotonic()
        read_plan(place, verify)
        again.append(time.monotonic() - started)
    report = {
        "samples": plan.report["samples"],
        "packs": plan.report["packs"],
        "real": plan.report["efficiency"],
        "open_seconds": opened,
        "check_cpu_seconds": checked,
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "peak_gib": memory,
        "read_verified_seconds": again[0],
        "read_seconds": again[1],
        "disk_gib": sum(path.stat().st_size for path in place.iterdir()) / 2**30,
    }
    for together, name in ((data.shuffle_shards, "shards"), (1 << 30, "shards_all")):
        if together != data.shuffle_shards:
            if len(plan.samples) > 2_000_000:
                break  # the smaller plan shows it
            wide = replace(data, shuffle_shards=together)
            plan = ensure_plan("training", root, manifests, wide, stage)
        report[f"{name}_a_step"], report[f"{name}_in_100"] = shards_read(plan, manifests)
    pipe.send(report)
    pipe.close()


def shards_read(plan: Plan, manifests: Mapping[str, Manifest]) -> tuple[float, float]:
    """Different shards in a step, and in a hundred steps in a row; means."""
    shards: list[np.ndarray] = []
    for step in range(min(STEPS_READ, plan.steps)):
        samples = np.concatenate(plan.packs(step))
        codes = np.zeros(len(samples), np.int64)
        for which, name in enumerate(plan.names):
            mine = samples[:, 0] == which
            codes[mine] = which << 32 | manifests[name].shard[samples[mine, 1]].astype(np.int64)
        shards.append(np.unique(codes))
    hundreds = [shards[first : first + 100] for first in range(0, len(shards), 100)]
    whole = [part for part in hundreds if len(part) == 100] or hundreds
    return (
        float(np.mean([len(step) for step in shards])),
        float(np.mean([len(np.unique(np.concatenate(part))) for part in whole])),
    )


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def plan_alone(folder: Path, root: Path) -> dict[str, Any]:
    """`_plan` in a process of its own, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_plan, args=(theirs, folder, root))
    process.start()
    theirs.close()
    try:
        report: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        raise ValueError(f"planning ended with status {process.exitcode}; out of memory?") from None
    process.join()
    return report


def measure(
    work: Path, scale: float, steps: int, turns: int, threads: int, say: Callable[[str], None]
) -> Section:
    """The table "Planning"; `scale` 10: ten and a hundred million samples."""
    geometry = AnyresGeometry.from_model(stage2().model)
    reports = []
    for count in SAMPLES:
        folder = work / "planning"
        shutil.rmtree(folder, ignore_errors=True)
        samples = int(count * scale)
        write_manifests(folder / "data", samples, geometry)
        say(f"manifests of {samples} samples are written")
        reports.append(plan_alone(folder / "data", folder / "plan"))
        say(f"{samples} samples: {reports[-1]['cpu_seconds']:.1f} s of CPU")
        shutil.rmtree(folder)
    return Section(
        title="Planning",
        method=METHOD,
        columns=[
            "samples",
            "packs",
            "CPU s",
            "us a sample",
            "of it checking",
            "memory, GiB",
            "plan, GiB",
            "open, ms",
            "again, ms",
            "shards a step",
            "in 100 steps",
        ],
        rows=[_row(report) for report in reports],
        facts=machine.facts(),
        notes=_verdicts(reports),
        settings={"scale": scale, "shuffle_shards": mixture({}).shuffle_shards},
        data={"reports": reports},
    )


def _row(report: Mapping[str, float]) -> list[str | float | int | None]:
    shards = [f"{report['shards_a_step']:.0f}", f"{report['shards_in_100']:.0f}"]
    if "shards_all_a_step" in report:
        shards[0] += f" ({report['shards_all_a_step']:.0f})"
        shards[1] += f" ({report['shards_all_in_100']:.0f})"
    return [
        int(report["samples"]),
        int(report["packs"]),
        report["cpu_seconds"],
        1e6 * report["cpu_seconds"] / report["samples"],
        report["check_cpu_seconds"],
        report["peak_gib"],
        report["disk_gib"],
        1e3 * report["open_seconds"],
        f"{1e3 * report['read_verified_seconds']:.0f}, {1e3 * report['read_seconds']:.0f}",
        *shards,
    ]


def _verdicts(reports: list[dict[str, Any]]) -> list[str]:
    first, last = reports[0], reports[-1]
    each = [report["cpu_seconds"] / report["samples"] for report in reports]
    factor = GOAL_SAMPLES / last["samples"]
    seconds = last["cpu_seconds"] * factor
    growth = (last["peak_gib"] - first["peak_gib"]) / (last["samples"] - first["samples"])
    memory = last["peak_gib"] + growth * (GOAL_SAMPLES - last["samples"])
    said = "measured" if factor <= 1.01 else "by the scaling of these two"
    linear = each[1] <= LINEAR * each[0]
    return [
        f"a sample of the larger plan costs {each[1] / each[0]:.2f} of one of the smaller: "
        f"{'linear' if linear else 'NOT linear'}",
        f"100 million samples: {seconds:.0f} s (goal: under {GOAL_SECONDS:.0f}), {memory:.1f} GiB "
        f"(goal: under {GOAL_GIB:.0f}), {said}: "
        f"{'met' if linear and seconds < GOAL_SECONDS and memory < GOAL_GIB else 'MISSED'}",
    ]
