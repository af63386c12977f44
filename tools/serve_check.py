"""Does an export answer the same in every program that may serve it?

    python -m tools.serve_check hf=DIR [pythons=[.venv-serve/bin/python,...]] [tokens=64]

Asks transformers in this environment and in others, each in a process of its own, the questions of
the gate, and compares token ids, pixels, features, logits and greedy answers. What could not be
tried is said.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.anyres import AnyresGeometry
from tools.command import required, run, split_arguments
from tools.model_from_hf import from_llava
from tools.parity.cases import cases
from tools.parity.finding import Finding, largest_difference, yes_or_no
from tools.parity.network import GREEDY, ask_transformers

USAGE = "python -m tools.serve_check hf=DIR [pythons=[DIR/bin/python,...]] [tokens=64]"
HERE = Path(".venv-serve/bin/python")
# The same operations in float32; releases may order a sum otherwise.
LOGITS = 1e-5


@dataclass(frozen=True)
class Answers:
    """What one environment's transformers made of all cases."""

    version: str
    arrays: dict[str, dict[str, Any]]


def compare(ours: Answers, theirs: Answers) -> list[Finding]:
    """Each kind of array of every case, ours against another release's."""
    label = f"{ours.version} and {theirs.version}"

    def pairs(key: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, arrays in ours.arrays.items():
            if key in arrays:
                yield name, arrays[key], theirs.arrays[name][key]

    different = [
        f"{name}, {key}"
        for name, arrays in ours.arrays.items()
        for key in arrays
        if key.startswith("ids") and not np.array_equal(arrays[key], theirs.arrays[name][key])
    ]
    return [
        yes_or_no(f"{label}: tokens", different, "chats and greedy answers are the same"),
        largest_difference(f"{label}: pixels", pairs("pixels"), 0.0, "chats with pictures"),
        largest_difference(f"{label}: features", pairs("features"), LOGITS, "chats with pictures"),
        largest_difference(f"{label}: logits", pairs("logits"), LOGITS, "chats"),
    ]


def ask(export: Path, python: Path, tokens: int) -> Answers:
    """One environment's answers. Raises ValueError where it cannot run the export."""
    geometry = AnyresGeometry.from_model(from_llava("export", export).model)
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        folder = Path(name)
        version = ask_transformers(export, python, folder, cases(geometry), tokens, print)
        arrays = {}
        for case in cases(geometry):
            with np.load(folder / f"{case.name}.npz") as loaded:
                arrays[case.name] = {key: loaded[key] for key in loaded.files}
        return Answers(version, arrays)


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("hf", "pythons", "tokens"))
    if rest or not ours.get("tokens", "1").isdigit():
        raise ValueError(f"unknown argument {(rest or ['tokens='])[0]!r}; usage: {USAGE}")
    export = required(ours, "hf", USAGE)
    tokens = int(ours.get("tokens") or GREEDY)
    listed = ours.get("pythons", str(HERE)).strip("[]").split(",")
    others = [Path(word.strip()) for word in listed if word.strip()]
    findings: list[Finding] = []
    own = ask(export, Path(sys.executable), tokens)
    print(f"transformers {own.version} loads the folder and answers")
    for python in others:
        if not python.exists():
            print(f"not tried: {python} does not exist (make setup-serve makes {HERE})")
            continue
        findings += _shown(compare(own, ask(export, python, tokens)))
    failed = [finding.name for finding in findings if not finding.passed]
    if failed:
        raise ValueError(f"{export} answers differently: {', '.join(failed)}")


def _shown(findings: Sequence[Finding]) -> Sequence[Finding]:
    for finding in findings:
        print(finding.line(), flush=True)
    return findings


if __name__ == "__main__":
    sys.exit(run(main))
