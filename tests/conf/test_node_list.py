"""Slurm's lists of nodes."""

import pytest

from conf.node_list import expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("acc1", ["acc1"]),
        ("acc[1-2]", ["acc1", "acc2"]),
        ("as01r1b[01-03,07],x-2", ["as01r1b01", "as01r1b02", "as01r1b03", "as01r1b07", "x-2"]),
        ("r[1-2]b[09-10]", ["r1b09", "r1b10", "r2b09", "r2b10"]),
    ],
)
def test_expand(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", ["a[1", "a]b", "a[x]", "a;b", "a,,b", "a[1-999999999]"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nodes"):
        expand(text)
