"""A run directory with an import and shards, small enough to train in seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.compose import compose, dump
from conf.schema import Config, SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry
from pipeline.early_signals import SIGNALS
from tests.data_shards import toys
from tests.distributed import free_port, run_ranks
from tests.tools.small_backbones import OVERRIDES, write_backbones
from tools import hf_import

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES: dict[str, list[str]] = {
    "stage1": ["stage.lr.connector=1e-2"],
    "stage2": ["stage.lr.vision=1e-3", "stage.lr.connector=2e-3", "stage.lr.language=2e-3"],
    "stage3": ["stage.lr.connector=1e-3", "stage.lr.language=1e-3", "stage.lr.vision=0"],
}


CODE = "0123abcd"  # what the launcher's plan.json says of the code


class SmallRun:
    """`root/run/import` and three data sets (`chats`, `more`, `pairs`)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        vision, language, tokenizer = write_backbones(root / "backbones")
        paths = [f"vision={vision}", f"language={language}", f"tokenizer={tokenizer}"]
        hf_import.main([*OVERRIDES, *paths, f"out={root / 'run' / 'import'}"])
        (root / "run" / "plan.json").write_text(json.dumps({"code": CODE}))
        self.tokenizer = root / "run" / "import" / "tokenizer"
        chats = toys.write_parquet(root / "chats.parquet", toys.chat_rows(32))
        more = toys.write_parquet(root / "more.parquet", toys.chat_rows(12, first=100))
        pairs = toys.write_parquet(root / "pairs.parquet", toys.pair_rows(12))
        self.data = toys.data_config(
            root / "shards",
            self.tokenizer,
            chats=SourceConfig(str(chats)),
            more=SourceConfig(str(more)),
            pairs=SourceConfig(str(pairs), preference=True),
        )
        geometry = AnyresGeometry.from_model(self.config("stage1").model)
        digest = ChatTokenizer.from_directory(self.tokenizer).digest()
        for name, source in self.data.sources.items():
            build_dataset(name, source, self.data, geometry, digest)

    def config(self, stage: str, *overrides: str, run: str = "run") -> Config:
        """Configuration of one stage: 4 packs of 512 tokens a step, 6 steps."""
        config = compose(
            [
                *OVERRIDES,
                f"stage={stage}",
                "~demo",
                f"run={run}",
                f"runs_dir={self.root}",
                "stage.sequence_length=512",
                "stage.global_batch_size=4",
                "stage.steps=6",
                "stage.epochs=null",
                "stage.document_multiple=4",
                "stage.optimizer.warmup_ratio=0.2",
                "stage.checkpoint.every=2",
                "stage.checkpoint.keep=10",
                f"init_from={self.root / 'run' / 'import'}"
                if stage == "stage1"
                else "init_from=null",
                *STAGES[stage],
                *overrides,
            ]
        )
        config.data = self.data if hasattr(self, "data") else config.data
        config.data.mix = {
            "stage1": {"chats": 1.0},
            "stage2": {"chats": 0.7, "more": 0.3},
            "stage3": {"pairs": 1.0},
        }
        return config

    def stage_dir(self, config: Config) -> Path:
        """Where the stage of `config` writes."""
        return Path(config.runs_dir) / config.run / config.stage.name


def write_config(config: Config) -> Path:
    """Write the stage's config.yaml, which its ranks read."""
    directory = Path(config.runs_dir) / config.run / config.stage.name
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(dump(config))
    return path


def start(
    config: Config, file_bytes: int | None = None, program: Sequence[str] = ("pipeline.train",)
) -> list[subprocess.Popen[str]]:
    """Start the real training command (or another module and its arguments), one process a rank;
    no file may grow past `file_bytes`."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    path = write_config(config)
    world_size = config.parallel.world_size
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", *program, "--config", str(path)]
    return [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=limit,
        )
        for rank in range(world_size)
    ]


def train(
    config: Config,
    expect: int = 0,
    timeout: float = 180,
    program: Sequence[str] = ("pipeline.train",),
) -> str:
    """Run the stage to its end; rank 0's output. AssertionError with it if the code differs."""
    processes = start(config, program=program)
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[0] == expect, f"exit codes {codes}\n" + "\n".join(outputs)
    return outputs[0]


def _run_main(module: str, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of `python -m MODULE WORDS`, in this process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    said = io.StringIO()
    arguments, sys.argv = sys.argv, [module, *words]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(code or 0), said.getvalue()


def train_in_pool(
    config: Config,
    expect: int = 0,
    timeout: float = 120,
    program: Sequence[str] = ("pipeline.train",),
) -> str:
    """As `train`, in ranks that have torch imported already and go on living.

    Raises:
        RankFailure: a rank raised or gave no answer within `timeout` seconds.
    """
    words = [*program[1:], "--config", str(write_config(config))]
    size = config.parallel.world_size
    answers = run_ranks(size, _run_main, program[0], words, timeout=timeout)
    codes = [code for code, _ in answers]
    assert codes == [expect] * size, f"exit codes {codes}\n{answers[0][1]}"
    return answers[0][1]


def metrics(config: Config) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    path = Path(config.runs_dir) / config.run / config.stage.name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(config: Config) -> list[float]:
    """Loss of every step; the steps must be 1, 2, 3, ... ."""
    lines = metrics(config)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
