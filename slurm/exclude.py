"""exclude_nodes.json of a run: nodes that preflight found bad, and why. Later jobs avoid them.

A node is used again once its entry is removed from the file.
"""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from slurm.files import write_text

EXCLUDE = "exclude_nodes.json"
# Names come from files that others may write, and end in options of sbatch and scontrol.
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def entries(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Node -> {reason, job, time (seconds since 1970)}. Raises ConfigError on a damaged file."""
    path = run_dir / EXCLUDE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = {str(node): dict(entry) for node, entry in value.items()}
        strange = [node for node in found if not _NODE.fullmatch(node)]
        if strange:
            raise ValueError(f"{strange[0]!r} is no name of a node")
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it (preflight finds bad nodes again)"
        ) from error


def read(run_dir: Path) -> list[str]:
    """The nodes to avoid, sorted."""
    return sorted(entries(run_dir))


def add(run_dir: Path, reasons: Mapping[str, str], job: str = "") -> list[str]:
    """Record bad nodes; returns those that were not known, sorted.

    Raises ConfigError: the file is damaged, or a name is none.
    """
    for node in reasons:
        if not _NODE.fullmatch(node):
            raise ConfigError(f"{node!r} is no name of a node; it is not excluded")
    known = entries(run_dir)
    new = sorted(set(reasons) - set(known))
    if new:
        for node in new:
            reason = " ".join(reasons[node].split())[:500]
            known[node] = {"reason": reason, "job": job, "time": round(time.time(), 3)}
        text = json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False)
        write_text(run_dir / EXCLUDE, text + "\n")
    return new
