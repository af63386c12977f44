"""Real processes in milliseconds: a server that has imported what they need forks them.

    with ForkServer("pipeline.trainer") as server:
        rank = server.start("tests.pipeline.forked_training", ["--config", path], {...}, log)
        rank.kill()

A start of Python with torch and Megatron costs seconds, so tests that kill many processes could
not afford them. What is forked runs `main(arguments)` of a module in a session of its own, with its
output in a file, and dies with the server. The server must stay without threads, or a child could
inherit a lock that nobody will open.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Forked:
    """One child of the server."""

    def __init__(self, server: ForkServer, pid: int, log: Path) -> None:
        self._server, self.pid, self.log = server, pid, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it), None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises AssertionError, with its output, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end after {timeout} s:\n{self.output()}")
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        """SIGKILL to it and what it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """A signal to it alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        """All it has written."""
        return self.log.read_text(errors="replace")


class ForkServer:
    """Imports `modules` once, then forks."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *modules],
            cwd=_REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> Forked:
        """Run `module.main(arguments)`; a number that it returns is the exit code."""
        request = {"module": module, "arguments": list(arguments), "log": str(log)}
        return Forked(self, self.ask({**request, "environment": dict(environment)}), log)

    def ask(self, request: Mapping[str, Any]) -> Any:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server, and with it all that it forked."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(modules: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the modules print while they are imported
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = _fork(request, answers)
        answers.write(json.dumps(answer) + "\n")


def _fork(request: Mapping[str, Any], answers: Any) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        os.read(reading, 1)  # ends when the child leads a process group that can be killed
        os.close(reading)
        return pid
    code = 1
    try:
        os.setsid()
        os.close(writing)
        os.close(reading)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(answers.fileno())
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for wanted, descriptor in ((0, null), (1, log), (2, log)):
            os.dup2(descriptor, wanted)
        os.environ.update(request["environment"])
        code = int(importlib.import_module(request["module"]).main(request["arguments"]) or 0)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1:])
