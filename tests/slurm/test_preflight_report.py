"""Whom a failed preflight blames, from what its ranks left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurm.preflight_report import blamed

NODES = ["n0", "n1", "n2", "n3"]


def write(report: Path, rank: int, phase: str, attempt: str = "a", **more: Any) -> None:
    value = {"attempt": attempt, "rank": rank, "node": f"n{rank}", "phase": phase, **more}
    (report / f"rank_{rank}.json").write_text(json.dumps(value))


def write_bad(report: Path, *nodes: str, attempt: str = "a") -> None:
    value = {"attempt": attempt, "nodes": dict.fromkeys(nodes, "slow")}
    (report / "bad_nodes.json").write_text(json.dumps(value))


def test_nobody_where_there_was_no_preflight_or_all_passed(tmp_path: Path) -> None:
    assert blamed(tmp_path / "preflight", "a", NODES) == {}
    for rank in range(4):
        write(tmp_path, rank, "passed")
    assert blamed(tmp_path, "a", NODES) == {}


def test_a_rank_that_found_its_node_at_fault(tmp_path: Path) -> None:
    """The others were ended with it, in whatever phase they were; one had not begun."""
    for rank in range(3):
        write(tmp_path, rank, "data", problem=None)
    write(tmp_path, 1, "started", problem="no GPU", node_fault=True)
    assert blamed(tmp_path, "a", NODES) == {"n1": "no GPU"}


def test_a_problem_of_the_run_is_nobodys(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path, rank, "device", problem="no room", node_fault=False)
    assert blamed(tmp_path, "a", NODES) == {}


def test_a_node_that_never_began(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        write(tmp_path, rank, "versions")
    assert blamed(tmp_path, "a", NODES) == {"n2": "no rank of it began"}


def test_files_of_another_start_say_nothing(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path, rank, "versions", attempt="before")
    write_bad(tmp_path, "n1", attempt="before")
    assert blamed(tmp_path, "a", NODES) == {}
    for rank in range(4):
        write(tmp_path, rank, "passed")
    assert blamed(tmp_path, "a", NODES) == {}


@pytest.mark.parametrize(
    ("named", "expected"),
    [(["n1"], ["n1"]), (["n1", "n2"], []), (["n1", "elsewhere"], ["n1"]), (NODES, [])],
)
def test_half_of_the_nodes_are_never_the_exception(
    tmp_path: Path, named: list[str], expected: list[str]
) -> None:
    for rank in range(4):
        write(tmp_path, rank, "versions")
    write_bad(tmp_path, *named)
    assert list(blamed(tmp_path, "a", NODES)) == expected


def test_a_single_node_may_be_bad(tmp_path: Path) -> None:
    write(tmp_path, 0, "started", problem="no GPU", node_fault=True)
    assert list(blamed(tmp_path, "a", ["n0"])) == ["n0"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"attempt": "a"}', '{"attempt": "a", "nodes": 3}']
)
def test_damaged_files_are_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "rank_7.json").write_text(text)
    (tmp_path / "bad_nodes.json").write_text(text)
    assert blamed(tmp_path, "a", NODES) == {}
