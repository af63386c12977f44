"""The run directory: what was asked for, with which code, and what has been done.

    runs/NAME/  config.yaml  code/  env.txt  plan.json
    runs/NAME/stageN/  config.yaml  current.log  segments/NNN/{log.out, rank_1.out, ...}  DONE.json

Nothing in it is overwritten in place: files are written aside and renamed.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from conf.snapshot import CODE, LISTING, PLAN, code_digest, file_digests, listing, source_files
from slurm.files import write_text
from slurm.remote_host import RECORD as SENT

REPOSITORY = Path(__file__).resolve().parent.parent


class RunInUse(ConfigError):
    """Another process submits to the run, or runs it, now."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths and records of one run."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> "RunDirectory":
        return cls(Path(config.runs_dir) / config.run)

    def stage(self, name: str) -> Path:
        return self.root / name

    def config_path(self, name: str) -> Path:
        return self.stage(name) / "config.yaml"

    def is_done(self, name: str) -> bool:
        """Whether the stage's DONE.json exists; ValueError where it cannot be read."""
        path = self.stage(name) / "DONE.json"
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except ValueError as error:
            raise ConfigError(
                f"{path} is not JSON ({error}); delete it to end {name} anew"
            ) from error
        if not isinstance(done, dict):
            raise ConfigError(f"{path} is not a record of a stage; delete it to end {name} anew")
        return True

    def has_begun(self, name: str) -> bool:
        """Whether the stage has weights of its own: a whole checkpoint, or its end."""
        stage = self.stage(name)
        return (stage / "DONE.json").exists() or any(stage.glob("checkpoints/*/MANIFEST.json"))

    def recorded(self) -> dict[str, Config]:
        """Every stage's configuration as recorded by earlier submits, by stage name."""
        path = self.root / "config.yaml"
        if not path.exists():
            return {}
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path} is not YAML ({reason}); restore it") from error
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path} does not hold one configuration per stage; restore it")
        return {
            str(name): compose.from_mapping(value, f"{path}, {name}")
            for name, value in values.items()
        }

    def record(self, configs: Mapping[str, Config], plan: Mapping[str, Any]) -> None:
        """Write what is about to run: configurations, code, environment, plan."""
        self.root.mkdir(parents=True, exist_ok=True)
        every = {**self.recorded(), **configs}
        values = {name: compose.to_mapping(every[name]) for name in sorted(every)}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
        code = self._snapshot_code()
        write_text(self.root / "config.yaml", text)
        for name, config in configs.items():
            self.stage(name).mkdir(exist_ok=True)
            write_text(self.config_path(name), compose.dump(config))
        write_text(self.root / "env.txt", environment())
        write_text(self.root / "plan.json", json.dumps({**plan, "code": code}, indent=1) + "\n")

    def record_code(self) -> None:
        """Snapshot the code for jobs that belong to no stage; plan.json keeps what else it says."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / PLAN
        plan: dict[str, Any] = {"format": 1, "run": self.root.name, "stages": []}
        if path.exists():
            try:
                plan |= json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path} is damaged ({error}); restore it") from error
        code = self._snapshot_code()
        write_text(self.root / "env.txt", environment())
        write_text(path, json.dumps({**plan, "code": code}, indent=1) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; RunInUse when another one holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a+", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise RunInUse(
                    f"{self.root} is in use by process {holder}; wait for it, end it, or choose "
                    "another run=NAME"
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _snapshot_code(self) -> str:
        """Copy the packages to code/; returns their SHA-256. A different older copy is kept."""
        code, digest = self.root / CODE, code_digest(REPOSITORY)
        if code.exists():
            before = code_digest(code)
            if before == digest:
                return digest
            kept = self.root / f"code-{before[:8]}"
            print(f"the code has changed since the last submit; the older copy is now {kept}")
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(code, kept)
        aside = self.root / "code.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        for path in source_files(REPOSITORY):
            target = aside / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        os.replace(aside, code)
        write_text(self.root / LISTING, listing(file_digests(code)))
        return digest


def environment() -> str:
    """Python, machine, commit and every installed package, one to a line."""
    packages = sorted(
        f"{distribution.metadata['Name']}=={distribution.version}"
        for distribution in importlib.metadata.distributions()
    )
    head = [
        f"python {sys.version.split()[0]}",
        f"platform {platform.platform()}",
        f"processors {os.cpu_count()}",
        f"commit {_commit()}",
    ]
    return "\n".join(head + packages) + "\n"


def _commit() -> str:
    if (sent := REPOSITORY / SENT).exists():  # and no clone; git would look in the folders above
        return str(json.loads(sent.read_text(encoding="utf-8"))["commit"])
    git = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit} with uncommitted changes" if status else commit
