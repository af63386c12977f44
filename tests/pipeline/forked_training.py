"""The training command as a function, for `tests.fork_server`; it can write down what its model
receives.

With `--record PREFIX`, of every forward pass a line in PREFIX-RANK-PID.jsonl: the step, and a
digest of every tensor and number that `LlavaNext.forward` was given. A line is one `write`, so what
was received before a kill -9 is known.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.schema import Config
from slurm.local import free_port, rank_environment
from tests.fork_server import Forked, ForkServer
from tests.pipeline.small_run import write_config

# What the server imports: nearly all that training does.
MODULES = ("pipeline.trainer", "pipeline.model", "pipeline.objectives", "pipeline.callbacks")


def start_forked(server: ForkServer, config: Config, folder: Path, *words: str) -> list[Forked]:
    """The ranks of a stage, as the launcher starts them; their outputs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    given, port = [*words, "--config", str(write_config(config))], free_port()
    return [
        server.start(
            __name__, given, rank_environment(config, rank, port), folder / f"rank_{rank}.out"
        )
        for rank in range(config.parallel.world_size)
    ]


def digest(inputs: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    content = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if hasattr(value, "numpy"):
            array = value.detach().cpu().numpy()
            content.update(f"{name} {array.dtype} {array.shape}".encode())
            content.update(array.tobytes())
        else:
            content.update(f"{name} {value!r}".encode())
    return content.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """What `python -m pipeline.train` does, with `--record` besides."""
    from pipeline import early_signals, train

    parser = argparse.ArgumentParser()
    parser.add_argument("--record")
    ours, theirs = parser.parse_known_args(arguments)
    early_signals.arm()
    if ours.record:
        _record(f"{ours.record}-{os.environ['RANK']}-{os.getpid()}.jsonl")
    sys.argv = ["pipeline.train", *theirs]
    train.main()


def _record(path: str) -> None:
    from models.llava_next import LlavaNext
    from pipeline.data import StageData

    lines = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    batches, forward = StageData.batches, LlavaNext.forward
    current = -1

    def steps(self: StageData, start: int) -> Iterator[tuple[int, Any]]:
        nonlocal current
        for step, micro_batches in batches(self, start):
            current = step
            yield step, micro_batches

    def recorded(self: LlavaNext, **inputs: Any) -> Any:
        os.write(lines, json.dumps([current, digest(inputs)]).encode() + b"\n")
        return forward(self, **inputs)

    StageData.batches, LlavaNext.forward = steps, recorded  # type: ignore[assignment,method-assign]
