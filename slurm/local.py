"""Run one stage on this machine: one process a rank, ended together.

The environment is torchrun's (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT).  Rank 0 speaks on the terminal and in `log.out`, the others in `rank_N.out` beside it.
"""

import ctypes
import os
import queue
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from conf.schema import Config
from conf.schema.errors import ConfigError

GRACE_SECONDS = 60.0  # between asking a rank to end and ending it; room to save a checkpoint
FAILURE_GRACE_SECONDS = 5.0  # the same once a rank has failed: its peers have nothing to save
TAIL_BYTES = 16384
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What a rank returns that was asked to stop, by a signal or a file, and has saved its checkpoint.
STOPPED_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# Above those of batch jobs (slurm/bodies.py), below those that Linux gives to connections.
PORTS = (30000, 32768)
MANY_RANKS = 8  # as many processes as any machine without GPUs may be asked for

# Nothing in a job may ask the internet; everything is staged before.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class JobFailed(Exception):
    """A stage that ended without success: one line, and the exit code for the shell."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def command(config_path: Path) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "pipeline.train", "--config", str(config_path)]


def rank_environment(config: Config, rank: int, port: int | str) -> dict[str, str]:
    """Variables that a rank gets on top of the caller's."""
    threads = str(config.cluster.threads_per_rank)
    world_size = str(config.parallel.world_size)
    extra = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **OFFLINE,
    }
    if config.cluster.gpus_per_node:
        # Megatron's overlap of tensor-parallel communication needs one hardware queue.
        extra["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    elif sys.platform == "linux":
        # Laptops whose own host name does not resolve.
        extra["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return extra


def describe(config: Config, config_path: Path) -> str:
    """The shell line that one would type for rank 0, for `DRY=1`."""
    variables = rank_environment(config, 0, "PORT")
    words = [f"{name}={value}" for name, value in variables.items()]
    return " ".join(words + [shlex.join(command(config_path))])


def refuse_too_many(config: Config) -> None:
    """ConfigError where this machine would drown in ranks."""
    most = max(MANY_RANKS, os.cpu_count() or 1)
    if not config.cluster.gpus_per_node and config.parallel.world_size > most:
        raise ConfigError(
            f"parallel.world_size={config.parallel.world_size} processes are too many for this "
            f"machine without GPUs; use at most {most}, or set cluster.gpus_per_node"
        )


def run(
    config: Config,
    config_path: Path,
    segment: Path,
    program: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run every rank to its end.

    `program` stands in for the training command in tests; `environment` is added to that of every
    rank.  Raises JobFailed, when the first rank fails, after ending the others; or when this
    process is asked to end (SIGINT, SIGTERM), after passing the signal on.
    """
    job = _Job(config, segment, list(program) or command(config_path), dict(environment or {}))
    try:
        with _Signals(job.forward):
            job.start()
            job.wait()
    finally:
        for process in job.processes:
            _signal(process, signal.SIGKILL)  # and whatever a rank left behind


@dataclass
class _Job:
    config: Config
    segment: Path
    program: list[str]
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    exits: "queue.Queue[tuple[int, int]]" = field(default_factory=queue.Queue)
    asked: int = 0  # signal by which this process was asked to end

    def __post_init__(self) -> None:
        self.pump = threading.Thread(target=self._tee, daemon=True)

    def log(self, rank: int) -> Path:
        return self.segment / ("log.out" if rank == 0 else f"rank_{rank}.out")

    def start(self) -> None:
        """Start every rank, then watch them: forking is safest before there are threads."""
        port = free_port()
        try:
            for rank in range(self.config.parallel.world_size):
                self.processes.append(self._start_rank(rank, port))
        except OSError:
            self.forward(signal.SIGKILL)
            raise
        for rank, process in enumerate(self.processes):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()
        self.pump.start()

    def _start_rank(self, rank: int, port: int) -> "subprocess.Popen[bytes]":
        with self.log(rank).open("wb") as log:
            return subprocess.Popen(
                self.program,
                env={
                    **os.environ,
                    **rank_environment(self.config, rank, port),
                    **self.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else log,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C reaches only this process, which passes it on; and what a
                # rank starts can be ended with it.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def forward(self, number: int) -> None:
        """Pass a signal on; the second time, end everything at once."""
        again, self.asked = bool(self.asked), number
        for process in self.processes:
            if process.poll() is None:
                _signal(process, signal.SIGKILL if again else number)

    def wait(self) -> None:
        """Wait for every rank; end the others when one fails. Raises JobFailed."""
        failure = ""
        left = set(range(len(self.processes)))
        end: float | None = None  # when the ranks that are left will be killed
        while left:
            if self.asked and end is None:
                end = time.monotonic() + GRACE_SECONDS
            if end is not None and time.monotonic() > end:
                for rank in left:
                    _signal(self.processes[rank], signal.SIGKILL)
            try:
                # Short, so that a signal that came meanwhile is noticed.
                rank, code = self.exits.get(timeout=0.2)
            except queue.Empty:
                continue
            left.discard(rank)
            if code in STOPPED_CODES and not failure and not self.asked:
                self.forward(code - 128)  # its peers have stopped at the same step
            elif code and not failure and not self.asked:
                failure = f"rank {rank} {_ending(code)}"
                failed_log = self.log(rank)
                end = time.monotonic() + FAILURE_GRACE_SECONDS
                for other in left:
                    _signal(self.processes[other], signal.SIGTERM)
        self.pump.join(timeout=5)
        if failure:
            raise JobFailed(f"{failure}: {last_line(failed_log)} (log: {failed_log})")
        if self.asked:
            raise JobFailed(
                f"stopped by {signal.Signals(self.asked).name} or on request; the same command "
                f"goes on from the last checkpoint (log: {self.log(0)})",
                128 + self.asked,
            )

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.exits.put((rank, process.wait()))

    def _tee(self) -> None:
        """Copy rank 0's output to its log and the terminal, as it comes."""
        pipe = self.processes[0].stdout
        assert pipe is not None
        # A disk that is full or a terminal that has gone must not block the rank.
        with self.log(0).open("wb", buffering=0) as log:
            while data := os.read(pipe.fileno(), 65536):
                with suppress(OSError):
                    log.write(data)
                with suppress(OSError, ValueError):
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()


class _Signals:
    """Hand SIGINT and SIGTERM to a function for as long as a job runs."""

    def __init__(self, handle: Callable[[int], None]) -> None:
        self.handle = handle
        self.before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._received)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _received(self, number: int, _: FrameType | None) -> None:
        self.handle(number)


def last_line(path: Path) -> str:
    """The last line of a log that says something, cut to 500 characters."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it said nothing"


def _ending(code: int) -> str:
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a rank; SIGKILL goes to everything the rank started as well."""
    try:
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except (ProcessLookupError, PermissionError):
        pass


def free_port() -> int:
    """A TCP port that nobody listens on, and that the kernel gives to no connection meanwhile.

    Ports that it chooses itself are out of a range of its own; one of those may be taken again
    before rank 0 listens.
    """
    for port in random.SystemRandom().sample(range(*PORTS), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def die_with_parent() -> Callable[[], None] | None:
    """On Linux the kernel ends a rank whose launcher was killed without a chance to tell it."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
