"""What preflight leaves behind: `rank_N.json` of each rank and `bad_nodes.json`.

`slurm.preflight_report` reads both after the ranks have ended, however they did; a rank that was
killed leaves the last phase that it had passed.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import write_json

BAD_NODES = "bad_nodes.json"
PASSED = "passed"


class Problem(ValueError):
    """A check that failed; `node_fault` where another node would do better."""

    def __init__(self, message: str, node_fault: bool = False) -> None:
        super().__init__(message)
        self.node_fault = node_fault


@dataclass
class Verdict:
    """What rank 0 decided; `nodes` are to blame, with the reason for each."""

    problems: list[str] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def blame(self, nodes: Sequence[str], reason: str) -> None:
        """A problem of these nodes."""
        for node in nodes:
            self.nodes.setdefault(node, reason)
            self.problems.append(f"{node}: {reason}")


@dataclass
class RankReport:
    """This rank's file, written again as each phase passes."""

    directory: Path
    rank: int
    world_size: int
    local_rank: int
    node: str
    attempt: str
    phase: str = "started"
    problem: str | None = None
    node_fault: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_environment(cls, directory: Path) -> "RankReport":
        """From the variables of the launcher. ValueError where they are missing."""
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError):
            raise ValueError("RANK and WORLD_SIZE are not set; start preflight with srun") from None
        return cls(
            directory=directory,
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            attempt=os.environ.get("ATTEMPT_ID", ""),
        )

    @property
    def leads(self) -> bool:
        """Whether this rank checks what is the same for all ranks of its node."""
        return self.local_rank == 0

    def passed(self, phase: str, numbers: Mapping[str, Any] | None = None) -> None:
        """Record that `phase` is over."""
        self.phase = phase
        self.numbers.update(numbers or {})
        self.write()

    def failed(self, problem: Problem) -> None:
        """Record what is wrong; the phase stays the last that passed."""
        self.problem, self.node_fault = str(problem), problem.node_fault
        self.write()

    def conclude(self, verdict: Verdict) -> None:
        """Rank 0 says what is wrong, and leaves the nodes to blame for the exclude list."""
        if verdict.nodes:
            self.write_bad_nodes(verdict.nodes)
        told = Problem("; ".join(verdict.problems))
        if self.problem is None:
            self.failed(told)
        self.tell(told)

    def tell(self, verdict: Problem | None = None) -> None:
        """One line on stderr: the verdict on all nodes, else this node's own problem."""
        said = f"{self.node}: {self.problem}" if verdict is None else str(verdict)
        print(f"error: preflight: {' '.join(said.split())}", file=sys.stderr, flush=True)

    def write(self) -> None:
        # A folder that cannot be written is found and told by the disk phase.
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(
                self.directory / f"rank_{self.rank}.json",
                {
                    "format": 1,
                    "attempt": self.attempt,
                    "rank": self.rank,
                    "world_size": self.world_size,
                    "node": self.node,
                    "host": socket.gethostname(),
                    "phase": self.phase,
                    "problem": self.problem,
                    "node_fault": self.node_fault,
                    "time": round(time.time(), 3),
                    **self.numbers,
                },
            )

    def write_bad_nodes(self, nodes: Mapping[str, str]) -> None:
        """Node -> reason, for the exclude list."""
        with suppress(OSError):
            write_json(
                self.directory / BAD_NODES,
                {"format": 1, "attempt": self.attempt, "nodes": dict(nodes)},
            )
