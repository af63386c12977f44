"""A run directory made by hand, as jobs leave it, for what watches and cancels."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from slurm import commands
from slurm.attempts import Attempt, append_end, append_start
from slurm.files import point
from slurm.job import LOG, RECORD, SCRIPT, JobRecord

CONFIG: dict[str, Any] = {
    "cluster": {
        "gpus_per_node": 4,
        "site": {"cost_unit": "node-hours", "cost_per_gpu_hour": 0.25},
    },
    "parallel": {"world_size": 8},
}


class WatchedRun:
    """runs/NAME below a test's directory."""

    def __init__(self, runs: Path, name: str = "demo") -> None:
        self.root = runs / name
        self.root.mkdir(parents=True)
        self.words = [f"run={name}", f"runs_dir={runs}"]

    def plan(self, *stages: str, gpu_hours: float = 10.0, cluster: str = "mn5") -> None:
        entries = [{"name": s, "gpu_hours": gpu_hours, "cluster": cluster} for s in stages]
        (self.root / "plan.json").write_text(json.dumps({"format": 1, "stages": entries}))
        for stage in stages:
            self.stage(stage)

    def stage(self, name: str, steps: int | None = 100) -> Path:
        directory = self.root / name
        directory.mkdir(exist_ok=True)
        config = {**CONFIG, "stage": {"steps": steps}}
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        return directory

    def trained(self, stage: str, upto: int, loss: float = 2.0, seconds: float = 0.5) -> None:
        lines = [
            {"step": n, "loss": loss, "tokens": 1000, "seconds": seconds}
            for n in range(1, upto + 1)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (self.root / stage / "metrics.jsonl").write_text(text)

    def saved(self, stage: str, step: int, ago: float = 0.0) -> None:
        manifest = self.root / stage / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        os.utime(manifest, (time.time() - ago, time.time() - ago))

    def done(self, stage: str, step: int) -> None:
        (self.root / stage / "DONE.json").write_text(json.dumps({"step": step}))

    def segment(self, stage: str, number: int) -> Path:
        directory = self.root / stage / "segments" / f"{number:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def log(self, stage: str, number: int, text: str) -> Path:
        path = self.segment(stage, number) / LOG
        with path.open("a") as file:
            file.write(text)
        point(self.root / stage / "current.log", Path("segments") / f"{number:03d}" / LOG)
        return path

    def attempt(
        self,
        stage: str,
        number: int,
        outcome: str = "",
        seconds: float = 3600.0,
        job_id: str = "",
        reason: str = "",
        ago: float = 0.0,  # its end; its beginning is `seconds` before
    ) -> None:
        started = time.time() - ago - seconds
        attempt = Attempt(f"{job_id}-{number}-{started}", f"{number:03d}", started, 0, job_id)
        attempt = replace(attempt, gpus=8)
        append_start(self.root / stage, attempt)
        if outcome:
            ended = replace(attempt, ended=started + seconds, outcome=outcome, reason=reason)
            append_end(self.root / stage, replace(ended, code=1 if outcome == "failed" else 0))

    def record(
        self, name: str, job_id: str, kind: str = "segment", dependency: str = "", gpus: int = 8
    ) -> Path:
        """job.json of a job whose name ends in `name`, such as stage1.001; its folder."""
        *parts, number = name.split(".")
        folders = {"segment": "segments", "verify": "verify"}
        stage = parts[0] if kind in folders else ""
        directory = self.root / "arrays" / parts[0] / number
        if kind in folders:
            directory = self.root / stage / folders[kind] / number
        elif kind == "export":
            directory = self.root / "export" / number
        directory.mkdir(parents=True, exist_ok=True)
        JobRecord(
            job_id=job_id,
            name=f"{self.root.name}.{name}",
            kind=kind,
            stage=stage,
            number=int(number),
            directory=str(directory),
            cluster="mn5",
            nodes=2,
            gpus=gpus,
            hours=1.0,
            dependency=dependency,
            submitted=time.time(),
            code="0" * 64,
            elements=4 if kind == "array" else None,
        ).write()
        return directory

    def submit(
        self,
        name: str,
        body: str,
        kind: str = "segment",
        words: Sequence[str] = (),
        dependency: str = "",
        recorded: bool = True,
    ) -> str:
        """Queue a real job as the launcher does; its id."""
        directory = self.record(name, "0", kind, dependency, gpus=0)
        script = directory / SCRIPT
        script.write_text(f"#!/bin/bash\n{body}\n")
        after = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
        log = directory / ("log_%a.out" if kind == "array" else LOG)
        job_id = commands.sbatch(
            script,
            [
                f"--job-name={self.root.name}.{name}",
                f"--comment=amalia-vl:{self.root}",
                f"--output={log}",
                "--open-mode=append",
                *after,
                *words,
            ],
        )
        if recorded:
            self.record(name, job_id, kind, dependency, gpus=0)
        else:
            (directory / RECORD).unlink()
        return job_id
