"""Two sets of weights, tensor by tensor: `make diff A=... B=...`.

    python -m tools.diff_checkpoints a=DIR b=DIR [all=true] [most=20]

Each is a Hugging Face directory, a stage of a run, or one checkpoint of it. Prints the tensors that
differ, the largest difference first: largest absolute difference, norm of the difference over the
norm of A, share of numbers that differ. Exit status 1 where anything does.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.command import required, run, split_arguments
from tools.weights_view import WeightsView

USAGE = "python -m tools.diff_checkpoints a=DIR b=DIR [all=true] [most=20]"


@dataclass(frozen=True)
class TensorDifference:
    """How far two tensors of one name are apart."""

    name: str
    largest: float
    relative: float  # norm of the difference / norm of a
    differing: float  # share of the numbers

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.name}: largest {self.largest:.3g}, relative {self.relative:.3g}, "
            f"{self.differing:.2%} of the numbers"
        )


def differences(a: WeightsView, b: WeightsView) -> Iterator[TensorDifference]:
    """Every tensor that both have in the same shape; numbers compared in float64."""
    for name in sorted(set(a.shapes()) & set(b.shapes())):
        if a.shapes()[name] != b.shapes()[name]:
            continue
        largest = squares = norm = 0.0
        differing = 0
        for left, right in zip(a.blocks(name), b.blocks(name), strict=True):
            if left.dtype == right.dtype and torch.equal(left, right):
                norm += float(left.double().square().sum())
                continue
            gap = left.double() - right.double()
            # What is not a number in both is the same.
            gap[left.isnan() & right.isnan()] = 0.0
            differing += int((gap != 0).sum())
            largest = max(largest, float(gap.abs().nan_to_num(nan=math.inf).max()))
            squares += float(gap.square().sum())
            norm += float(left.double().square().sum())
        total = max(math.prod(a.shapes()[name]), 1)
        relative = math.sqrt(squares / norm) if norm else (math.inf if squares else 0.0)
        yield TensorDifference(name, largest, relative, differing / total)


def only_in_one(a: WeightsView, b: WeightsView) -> list[str]:
    """Lines about tensors that one side lacks or has in another shape."""
    lines = []
    for name in sorted(set(a.shapes()) | set(b.shapes())):
        left, right = a.shapes().get(name), b.shapes().get(name)
        if left is None or right is None:
            side, shape = ("B", right) if left is None else ("A", left)
            assert shape is not None
            lines.append(f"{name}: only in {side}, {list(shape)}")
        elif left != right:
            lines.append(f"{name}: {list(left)} in A, {list(right)} in B")
    return lines


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("a", "b", "all", "most"))
    if rest or not ours.get("most", "1").isdigit():
        raise ValueError(f"unknown argument {(rest or ['most='])[0]!r}; usage: {USAGE}")
    most = sys.maxsize if ours.get("all") == "true" else int(ours.get("most") or 20)
    paths: tuple[Path, Path] = (required(ours, "a", USAGE), required(ours, "b", USAGE))
    with WeightsView(paths[0]) as a, WeightsView(paths[1]) as b:
        for label, path, view in (("A", paths[0], a), ("B", paths[1], b)):
            print(f"{label}: {path}, {view.what}, {len(view.shapes())} tensors")
        lines = only_in_one(a, b)
        found = list(differences(a, b))
    apart = sorted((entry for entry in found if entry.differing), key=lambda entry: -entry.largest)
    lines += [entry.line() for entry in apart]
    for line in lines[:most]:
        print(line)
    if len(lines) > most:
        print(f"and {len(lines) - most} more; all=true lists them")
    if lines:
        raise ValueError(f"{len(lines)} tensors differ, {len(found) - len(apart)} are equal")
    print(f"all {len(found)} tensors are equal bit for bit")


if __name__ == "__main__":
    sys.exit(run(main))
