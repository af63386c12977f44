"""Stand-ins for Slurm's programs on PATH: recorded answers, or the real ones with a count."""

import os
import shlex
import shutil
from pathlib import Path

import pytest


class Programs:
    """A directory in front of PATH."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
        self.directory, self.calls = directory, directory / "calls"
        directory.mkdir(parents=True, exist_ok=True)
        path = str(directory)
        # sh, cat and sleep, for the stand-ins themselves.
        if alone:
            tools = directory / "tools"
            tools.mkdir()
            for name in ("sh", "cat", "sleep", "env", "printf"):
                (tools / name).symlink_to(shutil.which(name) or "/bin/false")
            path = f"{path}{os.pathsep}{tools}"
        else:
            path = f"{path}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)

    def answers(
        self, name: str, out: str = "", said: str = "", code: int = 0, sleep: float = 0
    ) -> None:
        """`name` prints `out`, complains `said` and returns `code`."""
        (self.directory / f"{name}.out").write_text(out, encoding="utf-8", newline="")
        (self.directory / f"{name}.err").write_text(said, encoding="utf-8")
        here = shlex.quote(str(self.directory))
        self._write(
            name,
            f"cat {here}/{name}.out; cat {here}/{name}.err >&2; sleep {sleep}; exit {code}",
        )

    def counts(self, name: str) -> None:
        """`name` is the real program, and its calls are counted."""
        real = shutil.which(name)
        assert real is not None
        self._write(name, f'exec {shlex.quote(real)} "$@"')

    def called(self, name: str) -> list[str]:
        """The words of every call of `name`."""
        if not self.calls.exists():
            return []
        lines = self.calls.read_text(encoding="utf-8").split("\n")
        return [line.partition("\t")[2] for line in lines if line.split("\t")[0] == name]

    def _write(self, name: str, body: str) -> None:
        path = self.directory / name
        note = f"printf '%s\\t%s\\n' {name} \"$*\" >> {shlex.quote(str(self.calls))}"
        path.write_text(f"#!/bin/sh\n{note}\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
