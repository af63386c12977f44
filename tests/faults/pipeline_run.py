"""A small pipeline on a throw-away Slurm: three stages, each two nodes' work, and what it did."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults.world import IMPORT, SHARDS, WITHOUT, World
from tests.pipeline.small_run import REPOSITORY, STAGES
from tests.slurm import processes
from tests.slurm.throwaway import ENDED, ThrowAwaySlurm
from tests.tools.small_backbones import OVERRIDES

# A step takes some 0.3 s on one core, so that a fault meets a stage between its first checkpoint
# and its last step; a fault comes at step 7 to 11.
STEPS, EVERY = 18, 6
NUMBERS = [
    "stage.sequence_length=512",
    "stage.global_batch_size=16",
    "stage.micro_batch_size=1",
    f"stage.steps={STEPS}",
    "stage.epochs=null",
    "stage.document_multiple=4",
    "stage.optimizer.warmup_ratio=0.2",
    "stage.gpu_hours=0.01",
    f"stage.checkpoint.every={EVERY}",
    "stage.checkpoint.keep=3",
    "stage.log_every=1",
]


@dataclass(frozen=True)
class Ended:
    """What a finished pipeline is compared by, and what it took."""

    weights: Mapping[str, str]  # file of the export -> SHA-256
    losses: Mapping[str, list[float]]  # stage -> loss of every step
    jobs: int  # batch jobs that began
    restarts: int  # of them, by Slurm
    attempts: int  # starts of the ranks
    seconds: float


class PipelineRun:
    """One run directory `root/runs/NAME` with its import and shards, submitted to `slurm`."""

    def __init__(self, world: World, name: str, slurm: ThrowAwaySlurm, *overrides: str) -> None:
        self.name, self.slurm, self.overrides = name, slurm, overrides
        self.root = world.root / "runs" / name
        self.shards = world.root / f"shards-{name}"
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.shards, ignore_errors=True)
        self.root.mkdir(parents=True)
        # Hard links would share bytes that a fault may damage.
        shutil.copytree(world.root / IMPORT, self.root / IMPORT)
        shutil.copytree(world.root / SHARDS, self.shards)
        self.started = time.monotonic()

    def arguments(self) -> list[str]:
        """Hydra's words for the run, stage by stage where they differ."""
        words = [*OVERRIDES, "cluster=slurm", f"run={self.name}", f"runs_dir={self.root.parent}"]
        words += ["~demo", "data=demo", f"data.root={self.shards}", *WITHOUT, *NUMBERS]
        words += [f"{stage}:{word}" for stage in STAGES for word in STAGES[stage]]
        return [*words, "cluster.spare_segments=2", *self.overrides]

    def command(self, module: str, *words: str, check: bool = True) -> str:
        """Run `python -m MODULE WORDS` as a user would; its output, both streams."""
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=REPOSITORY,
            env=self.slurm.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        if check:
            assert done.returncode == 0, f"{module}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def submit(self, check: bool = True) -> str:
        """`make pipeline CLUSTER=slurm`: three stages and the export."""
        words = ["stages=[stage1,stage2,stage3]", "export=true", *self.arguments()]
        return self.command("slurm.submit", *words, check=check)

    # --- watching ----------------------------------------------------------------------------

    def steps(self, stage: str) -> int:
        """Last step that metrics.jsonl of a stage tells of; 0 without."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(json.loads(self._metrics(stage)[-1])["step"])
        return 0

    def _metrics(self, stage: str) -> list[str]:
        return (self.root / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Job id -> (state, name) of every job of this run that Slurm remembers."""
        form = "--format=%i\t%T\t%j"
        text = self.slurm.run("squeue", "--noheader", "--states=all", form).stdout
        rows = [line.split("\t") for line in text.splitlines()]
        return {row[0]: (row[1], row[2]) for row in rows if row[2].startswith(f"{self.name}.")}

    def running(self, stage: str) -> str:
        """The running segment's job id of a stage. AssertionError when there is none."""
        ids = [
            job
            for job, (state, name) in self.jobs().items()
            if state == "RUNNING" and name.startswith(f"{self.name}.{stage}.0")
        ]
        assert len(ids) == 1, f"running segments of {stage}: {ids}\n{self.explain()}"
        return ids[0]

    def nodes(self, job: str) -> list[str]:
        """Nodes of a job; the first one runs the batch script and rank 0."""
        listed = self.slurm.run("squeue", "--noheader", "--format=%N", "--jobs", job).stdout
        names = self.slurm.run("scontrol", "show", "hostnames", listed.strip()).stdout
        return names.split()

    def over(self, job: str) -> bool:
        """Whether a job is over, for good."""
        return self.slurm.state(job) in ENDED

    def restarts(self, job: str) -> int:
        """Times that Slurm has started a job again."""
        return int(self.slurm.job(job)["Restarts"])

    def noticed(self, job: str) -> bool:
        """Whether a job was ended or requeued by Slurm."""
        state = self.slurm.job(job)
        return state["JobState"] in ENDED | {"PENDING"} or state["Restarts"] != "0"

    def attempts(self, stage: str) -> int:
        """Starts of the ranks of a stage."""
        with contextlib.suppress(OSError):
            text = (self.root / stage / "attempts.jsonl").read_text(encoding="utf-8")
            return text.count('"event": "start"')
        return 0

    def log(self, stage: str) -> str:
        """The logs of all segments of a stage."""
        paths = sorted((self.root / stage / "segments").glob("*/log.out"))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)

    def ranks(self, job: str, but: Iterable[int] = ()) -> dict[int, int]:
        """RANK -> process id of the training processes of a job; `but` are left out."""
        left_out = set(but)
        found: dict[int, int] = {}
        for pid in processes.pids():
            environment = processes.environment(pid)
            if environment.get("SLURM_JOB_ID") != job or pid in left_out:
                continue
            ours = environment.get("SLURM_CONF") == self.slurm.env["SLURM_CONF"]
            # Not what a rank has started: loaders and writers of checkpoints.
            child = "RANK" in processes.environment(processes.parent(pid))
            trains = "RANK" in environment and "pipeline.train" in processes.command(pid)
            if ours and trains and not child:
                found[int(environment["RANK"])] = pid
        return found

    def until_step(self, stage: str, step: int = EVERY + 1, timeout: float = 300) -> str:
        """Wait until the stage has made `step` steps; the running segment's job id."""
        self.until(lambda: self.steps(stage) >= step, f"step {step} of {stage}", timeout)
        return self.running(stage)

    def until_checkpoint(self, stage: str, step: int, timeout: float = 300) -> str:
        """Wait until the stage has saved after `step` steps; the running segment's job id."""
        path = self.root / stage / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json"
        self.until(path.exists, f"checkpoint {step} of {stage}", timeout)
        return self.running(stage)

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 300) -> None:
        """Wait for something; AssertionError, with what the run says, also when it has ended."""
        end = time.monotonic() + timeout
        while not condition():
            over = not self.alive()
            assert condition() or not over, f"the pipeline ended before {what}\n{self.explain()}"
            assert time.monotonic() < end, f"no {what} after {timeout} s\n{self.explain()}"
            time.sleep(0.05)

    def alive(self) -> bool:
        """Whether jobs of the run are queued or run."""
        return any(state not in ENDED for state, _ in self.jobs().values())

    def until_over(self, timeout: float = 480) -> Ended:
        """Wait until no job is left; what came out. AssertionError unless it is the export."""
        end = time.monotonic() + timeout
        while self.alive():
            assert time.monotonic() < end, f"not over after {timeout} s\n{self.explain()}"
            time.sleep(0.5)
        return self.ended()

    def ended(self) -> Ended:
        """Weights, losses and effort of the finished pipeline."""
        exported = sorted((self.root / "hf").glob("*.safetensors"))
        assert exported, f"no export\n{self.explain()}"
        starts = [
            line
            for path in self.root.glob("stage*/attempts.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
            if json.loads(line)["event"] == "start"
        ]
        records = [self.slurm.job(job) for job in self.jobs()]
        return Ended(
            weights={path.name: _sha256(path) for path in exported},
            losses={stage: self.losses(stage) for stage in STAGES},
            jobs=sum(record["NodeList"] not in ("", "(null)") for record in records),
            restarts=sum(int(record["Restarts"]) for record in records),
            attempts=len(starts),
            seconds=time.monotonic() - self.started,
        )

    def losses(self, stage: str) -> list[float]:
        """Loss of every step of a stage; AssertionError unless each step is there once."""
        lines = [json.loads(line) for line in self._metrics(stage)]
        steps = [line["step"] for line in lines]
        assert steps == list(range(1, STEPS + 1)), f"{stage} has steps {steps}\n{self.explain()}"
        return [line["loss"] for line in lines]

    def explain(self) -> str:
        """Jobs and the ends of the newest logs, for whoever reads a failed test."""
        parts = [f"{job}: {' '.join(told)}" for job, told in self.jobs().items()]
        logs = sorted(self.root.rglob("log.out"), key=lambda path: path.stat().st_mtime)
        for path in logs[-3:]:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
            parts += [f"--- {path.relative_to(self.root)}", *lines]
        return "\n".join(parts)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
