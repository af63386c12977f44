"""Measure what this machine can, into docs/benchmarks/speed.md and speed.json:

    python -m tools.bench [only=stage2,stage3,loss,layers] [out=docs/benchmarks] [work=runs/bench]
        [threads=1] [turns=5] [steps=8] [scale=0.2]

A section that is measured replaces its old one. Sides are measured in turn, each in a process of
its own. A table measured while the machine had other work says so and judges nothing.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools.command import run, split_arguments

SECTIONS = ("stage2", "stage3", "loss", "layers")
NAMES = ("only", "out", "work", "threads", "turns", "steps", "scale")
USAGE = f"python -m tools.bench [only={','.join(SECTIONS)}] [turns=5] [threads=1] ..."
HEADING = """# Speed on a CPU

Written by `make bench`; `make bench ARGS="only=stage2"` measures one section again. Ratios are
medians over turns in which all sides ran one after another, with the smallest and largest in
brackets. Nothing here was measured on a GPU ([gpu.md](gpu.md)).
"""


def _section(name: str) -> Callable:  # type: ignore[type-arg]
    if name == "stage2":
        from tools.benchmarks.stage2 import measure
    elif name == "stage3":
        from tools.benchmarks.stage3 import measure
    elif name == "loss":
        from tools.benchmarks.loss import measure
    else:
        from tools.benchmarks.layers import measure
    return measure


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    given, unknown = split_arguments(arguments, NAMES)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; usage: {USAGE}")
    chosen = [name for name in given.get("only", ",".join(SECTIONS)).split(",") if name]
    for name in chosen:
        if name not in SECTIONS:
            raise ValueError(f"only={name} is none of {', '.join(SECTIONS)}")
    try:
        threads, turns = int(given.get("threads", "1")), int(given.get("turns", "5"))
        steps, scale = int(given.get("steps", "8")), float(given.get("scale", "0.2"))
    except ValueError:
        raise ValueError(f"threads=, turns=, steps= and scale= take numbers; {USAGE}") from None
    if min(threads, turns, steps) < 1:
        raise ValueError("threads=, turns= and steps= must be at least 1")
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    from tools.benchmarks.table import Page, as_markdown

    page = Page(Path(given.get("out", "docs/benchmarks")), "speed", HEADING, SECTIONS)
    work = Path(given.get("work", "runs/bench"))
    for name in chosen:
        started = time.monotonic()

        def say(message: str, name: str = name, started: float = started) -> None:
            print(f"[{name}] {message}, {time.monotonic() - started:.0f} s", flush=True)

        section = _section(name)(
            work=work, scale=scale, steps=steps, turns=turns, threads=threads, say=say
        )
        page.write({name: section})
        print(as_markdown(section), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
