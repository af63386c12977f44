"""Slurm's short form of a list of nodes: `as01r1b[01-03,07],login2`."""

import re
from itertools import product

_WORD = re.compile(r"(?:[A-Za-z0-9_.-]|\[[0-9,-]+\])+")
_MOST = 100_000  # nodes that any range may stand for


def expand(text: str) -> list[str]:
    """Names of the nodes, in order. ValueError where the text is no list of nodes.

    Source: the syntax of `scontrol show hostnames` in Slurm's manual.
    """
    names: list[str] = []
    for word in re.split(r",(?![^\[]*\])", text.strip()) if text.strip() else ():
        if not _WORD.fullmatch(word):
            raise ValueError(f"{text[:80]!r} is not a list of nodes")
        parts = [part for part in re.split(r"(\[.*?\])", word) if part]
        choices = [_range(part) if part.startswith("[") else [part] for part in parts]
        names += ["".join(chosen) for chosen in product(*choices)]
    return names


def _range(part: str) -> list[str]:
    """`[01-03,07]` -> 01, 02, 03, 07."""
    numbers: list[str] = []
    for piece in part[1:-1].split(","):
        first, _, last = piece.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()) or int(last) - int(first) > _MOST:
            raise ValueError(f"{part!r} is not a range of nodes")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers
