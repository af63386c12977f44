"""Measure what this machine can, into docs/benchmarks:

    python -m tools.bench [bench=speed] [only=stage2,...] [out=docs/benchmarks] [work=runs/bench]
        [threads=1] [turns=5] [steps=8] [scale=...]

bench=speed: training beside transformers, into speed.md and speed.json. bench=data: the data path
beside transformers, webdataset and energon, into data.md and data.json. bench=interchange: an
export of true size beside a plain copy. A section that is measured replaces its old one. Sides are
measured in turn, each in a process of its own. A table measured while the machine had other work
says so and judges nothing.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.command import run, split_arguments

NAMES = ("bench", "only", "out", "work", "threads", "turns", "steps", "scale")


@dataclass(frozen=True)
class Group:
    """Sections of one page.

    Attributes:
        heading: Markdown above them.
        sections: name -> "module:function" that measures it, in the order of the page.
        scale: of the data, unless the command line says another.
    """

    heading: str
    sections: Mapping[str, str]
    scale: float


GROUPS = {
    "speed": Group(
        """# Speed on a CPU

Written by `make bench`; `make bench ARGS="only=stage2"` measures one section again. Ratios are
medians over turns in which all sides ran one after another, with the smallest and largest in
brackets. Nothing here was measured on a GPU ([gpu.md](gpu.md)).
""",
        {
            "stage2": "tools.benchmarks.stage2:measure",
            "stage3": "tools.benchmarks.stage3:measure",
            "loss": "tools.benchmarks.loss:measure",
            "layers": "tools.benchmarks.layers:measure",
        },
        scale=0.2,
    ),
    "data": Group(
        """# The data path

Written by `make bench BENCH=data`; `make bench BENCH=data ARGS="only=images"` measures one section
again. Ratios are medians over turns in which all sides ran one after another, with the smallest and
largest in brackets. Pictures are synthetic and the machine's file system is a local disk; what a
parallel file system gives is not measured here. How the path works: [../data/](../data/).
""",
        {
            "images": "tools.benchmarks.data.images:measure",
            "loading": "tools.benchmarks.data.loading:measure",
            "packing": "tools.benchmarks.data.packing:measure",
            "planning": "tools.benchmarks.data.planning:measure",
            "build": "tools.benchmarks.data.build:measure",
        },
        scale=1.0,
    ),
    "interchange": Group(
        """# To Hugging Face

Written by `make bench BENCH=interchange`, which needs 40 GB of disk; `ARGS="scale=0.05"` takes two
of the decoder's layers. What it does: [../interchange.md](../interchange.md).
""",
        {"export": "tools.benchmarks.interchange:measure"},
        scale=1.0,
    ),
}
USAGE = f"python -m tools.bench [bench={'|'.join(GROUPS)}] [only=...] [turns=5] [threads=1] ..."


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    given, unknown = split_arguments(arguments, NAMES)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; usage: {USAGE}")
    page_name = given.get("bench", "speed")
    if page_name not in GROUPS:
        raise ValueError(f"bench={page_name} is none of {', '.join(GROUPS)}")
    group = GROUPS[page_name]
    chosen = [name for name in given.get("only", ",".join(group.sections)).split(",") if name]
    for name in chosen:
        if name not in group.sections:
            raise ValueError(f"only={name} is none of {', '.join(group.sections)}")
    try:
        threads, turns = int(given.get("threads", "1")), int(given.get("turns", "5"))
        steps, scale = int(given.get("steps", "8")), float(given.get("scale", str(group.scale)))
    except ValueError:
        raise ValueError(f"threads=, turns=, steps= and scale= take numbers; {USAGE}") from None
    if min(threads, turns, steps) < 1:
        raise ValueError("threads=, turns= and steps= must be at least 1")
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    from tools.benchmarks.table import Page, as_markdown

    out, work = Path(given.get("out", "docs/benchmarks")), Path(given.get("work", "runs/bench"))
    page = Page(out, page_name, group.heading, list(group.sections))
    for name in chosen:
        started = time.monotonic()

        def say(message: str, name: str = name, started: float = started) -> None:
            print(f"[{name}] {message}, {time.monotonic() - started:.0f} s", flush=True)

        section = _measure(group.sections[name])(
            work=work, scale=scale, steps=steps, turns=turns, threads=threads, say=say
        )
        page.write({name: section})
        print(as_markdown(section), flush=True)


def _measure(place: str) -> Callable:  # type: ignore[type-arg]
    module, _, function = place.partition(":")
    found: Callable = getattr(importlib.import_module(module), function)  # type: ignore[type-arg]
    return found


if __name__ == "__main__":
    sys.exit(run(main))
