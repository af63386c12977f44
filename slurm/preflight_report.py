"""Which nodes a failed preflight blames: `bad_nodes.json`, else what the ranks' files say.

`pipeline.preflight` writes both, in the segment's preflight/ folder; ranks that were killed or
never came leave an unfinished file or none.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BAD_NODES = "bad_nodes.json"
PASSED = "passed"


def blamed(report: Path, attempt: str, nodes: Sequence[str]) -> dict[str, str]:
    """Node -> reason, of the preflight of `attempt`; empty if it passed or blames no node.

    Args:
        nodes: of the job, in order; others are never named.

    Half of a job's nodes or more are never named (a single node may be): what they share is at
    fault, not they.
    """
    ranks = _ranks(report, attempt)
    if not ranks:
        return {}
    named = _named(report, attempt)
    if not named and any(rank["phase"] != PASSED for rank in ranks):
        named = _failed(ranks) or _missing(ranks, nodes)
    named = {node: reason for node, reason in named.items() if node in nodes}
    if len(nodes) > 1 and 2 * len(named) >= len(nodes) and len(named) > 1:
        return {}
    return named


def _ranks(report: Path, attempt: str) -> list[dict[str, Any]]:
    values = [_mapping(path) for path in sorted(report.glob("rank_*.json"))]
    return [v for v in values if v.get("attempt") == attempt and "phase" in v and "node" in v]


def _named(report: Path, attempt: str) -> dict[str, str]:
    value = _mapping(report / BAD_NODES)
    named = value.get("nodes")
    if value.get("attempt") != attempt or not isinstance(named, dict):
        return {}
    return {str(node): str(reason) for node, reason in named.items()}


def _failed(ranks: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {
        str(rank["node"]): str(rank.get("problem"))
        for rank in ranks
        if rank.get("problem") and rank.get("node_fault") is True
    }


def _missing(ranks: Sequence[dict[str, Any]], nodes: Sequence[str]) -> dict[str, str]:
    """Nodes none of whose ranks began, while others did."""
    if any(rank.get("problem") for rank in ranks):
        return {}
    heard = {str(rank["node"]) for rank in ranks}
    return {node: "no rank of it began" for node in nodes if node not in heard}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
