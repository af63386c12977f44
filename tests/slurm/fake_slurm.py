"""sbatch, squeue, scancel and scontrol as shell scripts on PATH, for what Slurm rarely does.

They keep their queue in a folder: a file a job, holding what squeue prints.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SBATCH = r"""#!/bin/bash
here=HERE; reason=None; test=
for word in "$@"; do
  case "$word" in --hold) reason=JobHeldUser ;; --test-only) test=1 ;; esac
  script=$word
done
echo "sbatch $*" >> "$here/calls"
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
if [ -e "$here/refuse" ] && [ "$name" = "$(cat "$here/refuse")" ]; then
  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1
fi
if [ -n "$test" ]; then
  echo "sbatch: Job 1 to start at 2026-01-01T00:00:00 using 2 processors on nodes n1" >&2; exit 0
fi
id=$(cat "$here/next"); echo $((id + 1)) > "$here/next"
comment=$(sed -n 's/^#SBATCH --comment=//p' "$script")
dependency=$(sed -n 's/^#SBATCH --dependency=//p' "$script")
fields=("$id" N/A PENDING "$reason" me p 1 1 0:00 1:00 1 "" "$dependency" "$name" "$comment")
(IFS=$'\x1f'; printf '\x1e%s\n' "${fields[*]}") > "$here/queue/$id"
if [ -e "$here/mute" ] && [ "$name" = "$(cat "$here/mute")" ]; then
  echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1
fi
echo "$id"
"""
_SCANCEL = r"""#!/bin/bash
here=HERE; echo "scancel $*" >> "$here/calls"
for id in "$@"; do rm -f "$here/queue/$id"; done
"""
_SCONTROL = r"""#!/bin/bash
here=HERE; echo "scontrol $*" >> "$here/calls"
[ "$1" = release ] && sed -i 's/JobHeldUser/None/' "$here/queue/$2"
"""
_SQUEUE = r"""#!/bin/bash
here=HERE; echo "squeue $*" >> "$here/calls"
cat "$here"/queue/* 2>/dev/null; exit 0
"""


class FakeSlurm:
    """The folder and what it tells."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        (root / "queue").mkdir(parents=True)
        (root / "next").write_text("100\n")
        programs = root / "bin"
        programs.mkdir()
        texts = {"sbatch": _SBATCH, "scancel": _SCANCEL, "scontrol": _SCONTROL, "squeue": _SQUEUE}
        for name, text in texts.items():
            (programs / name).write_text(text.replace("HERE", str(root)))
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def refuse(self, name: str) -> None:
        """sbatch refuses the job of this name."""
        (self.root / "refuse").write_text(name)

    def mute(self, name: str) -> None:
        """sbatch takes the job of this name, but its answer is lost."""
        (self.root / "mute").write_text(name)

    def queue(self) -> dict[str, str]:
        """Id -> name of what is queued."""
        rows = [path.read_text() for path in sorted((self.root / "queue").iterdir())]
        return {row[1:].split("\x1f")[0]: row.split("\x1f")[13] for row in rows}

    def held(self) -> list[str]:
        """Ids of held jobs."""
        paths = sorted((self.root / "queue").iterdir())
        return [path.name for path in paths if "JobHeldUser" in path.read_text()]

    def calls(self) -> list[str]:
        """Every command line, in order."""
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []
