"""`vllm serve` on this machine for one question: started on a free port, asked, ended."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A 9B's weights read from a parallel file system, and its kernels compiled.
START_SECONDS = 1200.0
ANSWER_SECONDS = 300.0
STOP_SECONDS = 30.0


def arguments(export: Path, pictures: int = 4) -> list[str]:
    """Settings under which vLLM computes what the export's certificate was made for."""
    return [
        "serve",
        str(export),
        "--dtype",
        "float32",
        "--mm-processor-kwargs",
        '{"backend": "pil"}',
        "--limit-mm-per-prompt",
        json.dumps({"image": pictures}),
    ]


@contextmanager
def serving(
    command: Sequence[str], log: Path, say: Callable[[str], None], start: float = START_SECONDS
) -> Iterator[str]:
    """The server's address while it runs; it and its children are ended in any case.

    Raises:
        ValueError: it ends or does not get ready in `start` seconds, with the log's last line.
    """
    from slurm.local import OFFLINE, free_port

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **OFFLINE, "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + start
        while not _ready(address):
            if process.poll() is not None:
                raise ValueError(f"vllm serve ended with {process.returncode}: {_last(log)}")
            if time.monotonic() > deadline:
                raise ValueError(f"vllm serve is not ready after {start:.0f} s: {_last(log)}")
            time.sleep(0.5)
        say(f"vllm serves at {address}")
        yield address
    finally:
        _end(process)


def ask(address: str, body: dict[str, Any], seconds: float = ANSWER_SECONDS) -> str:
    """The answer's text. Raises ValueError where the server refuses or says something else."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with _opener.open(request, timeout=seconds) as response:
            answer = json.load(response)
        return str(answer["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        told = error.read(600).decode(errors="replace")
        raise ValueError(f"vllm serve refuses the request ({error.code}): {told}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"vllm serve does not answer: {error}") from None
    except (LookupError, TypeError):
        raise ValueError(f"vllm serve answers in another form: {str(answer)[:300]}") from None


# Straight to this machine, whatever proxy the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ready(address: str) -> bool:
    with suppress(OSError), _opener.open(f"{address}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


def _last(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 16384, 0))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1].strip()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The server's whole process group: its engine runs in children."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            if number == signal.SIGKILL or not _alive(process.pid):
                return


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
