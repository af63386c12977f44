"""The training loop of one stage: begin or resume, step, agree on stops, finish."""

import hashlib
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from conf.schema import Config
from models.llava_next import LlavaNext
from pipeline import checkpoint
from pipeline.async_save import AsyncSaver, Saved
from pipeline.callbacks.base import Callback, StepEvent
from pipeline.data import StageData
from pipeline.distributed import Ranks
from pipeline.files import digest_and_fsync, read_json
from pipeline.handoff import DONE, Done, check_predecessor, read_done, write_done
from pipeline.manifest import MANIFEST
from pipeline.memory import peak_bytes
from pipeline.model import gather_parameters
from pipeline.objectives.base import Objective
from pipeline.optimizer import build_optimizer, build_schedule, learning_rates
from pipeline.stages import frozen_modules, trainable_modules
from pipeline.step import StepResult, train_step
from pipeline.timers import CHECKPOINT, COMMUNICATION, DATA, StepTimers


def config_digest(config: Config) -> str:
    """Digest of what defines the numbers of a stage: not the layout, cluster or names."""
    value = asdict(config)
    relevant = {key: value[key] for key in ("model", "precision", "stage")}
    for key in ("log_every", "checkpoint", "gpu_hours"):
        del relevant["stage"][key]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def code_version(run_dir: Path) -> str:
    """SHA-256 of the code snapshot that the launcher took, from the run's plan.json."""
    path = run_dir / "plan.json"
    if not path.is_file():
        return "unknown"
    return str(read_json(path, "the run's plan", "submit the run again").get("code", "unknown"))


class Trainer:
    """Owns the state; callbacks own everything that only watches."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        data: StageData,
        models: Sequence[DistributedDataParallel],
        stage_dir: Path,
    ) -> None:
        self.config, self.ranks, self.data, self.stage_dir = config, ranks, data, stage_dir
        self.models = list(models)
        self.total_steps = data.steps
        chunks = [model.module for model in models]
        assert all(isinstance(chunk, LlavaNext) for chunk in chunks)
        self.optimizer = build_optimizer(
            self.models, config.stage, config.parallel, config.precision
        )
        self.schedule = build_schedule(self.optimizer, config.stage, data.steps)
        parallel = config.parallel
        self.state = checkpoint.TrainingState(
            models=chunks,
            optimizer=self.optimizer,
            schedule=self.schedule,
            layout={
                "world_size": parallel.world_size,
                "tensor": parallel.tensor,
                "pipeline": parallel.pipeline,
                "virtual_pipeline": parallel.virtual_pipeline,
                "context": parallel.context,
                "distributed_optimizer": int(parallel.distributed_optimizer),
            },
            plan_digest=data.plan.digest,
            config_digest=config_digest(config),
            code_version=code_version(stage_dir.parent),
        )
        self.stop_reason = ""  # this rank's wish; ranks agree after each step
        self.stop_agreed = self.save_agreed = self._save_wanted = False
        self.predecessor = Path(config.init_from) if config.init_from else self._default_source()
        self._predecessor_done: Done | None = None
        self._last_result: StepResult | None = None
        self._holds_predecessor = False
        self._callbacks: list[Callback] = []
        self.timers = StepTimers()
        keep = config.stage.checkpoint.keep
        self._saver = AsyncSaver(stage_dir, keep, self._before_commit)

    def _default_source(self) -> Path:
        number = self.config.stage.number
        return self.stage_dir.parent / ("import" if number == 1 else f"stage{number - 1}")

    def say(self, message: str) -> None:
        """One line on rank 0's output."""
        if self.ranks.reports:
            print(f"[{self.config.stage.name}] {message}", flush=True)

    def request_stop(self, reason: str) -> None:
        """Stop after the step in progress, with a checkpoint."""
        self.stop_reason = reason

    def request_save(self) -> None:
        """Save after the step in progress."""
        self._save_wanted = True

    def check_predecessor(self) -> Done:
        """The stage before, if it is done and fits.

        Raises:
            HandoffError: it is missing, unfinished or differs; the message names the field.
        """
        if self._predecessor_done is None:
            done = read_done(self.predecessor)
            check_predecessor(
                done,
                self.predecessor,
                self.config.stage.number,
                self.config.model,
                self.data.tokenizer.digest(),
                self.data.geometry.digest(),
            )
            self._predecessor_done = done
        return self._predecessor_done

    def begin(self) -> None:
        """Load the newest good checkpoint of this stage, or the predecessor's weights.

        Raises:
            CheckpointError: no checkpoint of the stage can be used.
        """
        found = checkpoint.newest_good(self.stage_dir)
        if found is None:
            self.load_predecessor()
            return
        directory, manifest, problems = found
        for problem in problems:
            self.say(f"WARNING: passed over a damaged checkpoint: {problem}")
        if manifest.config_digest != self.state.config_digest:
            raise checkpoint.CheckpointError(
                f"{directory} was trained with another model, precision or stage configuration; "
                "restore it, or start a new RUN"
            )
        shared = manifest.layout.get("distributed_optimizer")
        if shared is not None and shared != self.state.layout["distributed_optimizer"]:
            raise checkpoint.CheckpointError(
                f"{directory} was saved with parallel.distributed_optimizer="
                f"{str(bool(shared)).lower()}, whose optimizer state has another form; set it so"
            )
        checkpoint.load(self.state, directory, manifest)

    def load_predecessor(self) -> None:
        """Weights of the stage before, unless held; the optimizer's master copy follows them."""
        if self._holds_predecessor:
            return
        done = self.check_predecessor()
        directory = self.predecessor / done.checkpoint
        if digest_and_fsync(directory / MANIFEST)[1] != done.checkpoint_digest:
            raise checkpoint.CheckpointError(
                f"{directory / MANIFEST} is not the one that {self.predecessor / DONE} names; "
                "the predecessor changed after it was done"
            )
        weights = checkpoint.load_model(self.state.models, directory)
        # FP8 weights are rounded already: their master copy is made of what was read.
        fp8 = self.config.precision.fp8_params
        self.optimizer.reload_model_params(weights if fp8 else None)
        self._holds_predecessor = True
        self.say(f"begins from {directory}")

    def fit(self, objective: Objective, callbacks: list[Callback]) -> int:
        """Run the remaining steps. Returns 0 when the stage is done, else 128 + SIGTERM."""
        self._callbacks = callbacks
        for callback in callbacks:
            callback.on_start(self)
        for model in self.models:
            model.train()
        try:
            code = self._run_steps(objective)
            self._committed(self._saver.finish())
        except FloatingPointError:  # on every rank alike; what is being written is not spoilt
            self._committed(self._saver.finish())
            raise
        finally:
            self._saver.abandon()
            for callback in callbacks:
                callback.on_exit()
        for callback in callbacks:
            callback.on_end(self)
        if code == 0:
            self._finish()
        else:
            self.say(
                f"stopped after step {self.state.step} of {self.total_steps}; the checkpoint is "
                "saved and the same command resumes"
            )
        return code

    def _run_steps(self, objective: Objective) -> int:
        stage = self.config.stage
        self.timers.attach(self.models, self.optimizer)
        self.timers.begin()
        ended = asked = time.perf_counter()
        for step, micro_batches in self.timers.each(DATA, self.data.batches(self.state.step)):
            waited = time.perf_counter() - asked
            rates = learning_rates(self.optimizer)
            result = train_step(
                self.models,
                self.optimizer,
                objective,
                micro_batches,
                stage,
                self.ranks.device,
                self.timers,
            )
            self.schedule.step(1)
            with self.timers(COMMUNICATION):
                masked, waits, memory = self._agree(
                    sum(batch.n_masked for batch in micro_batches), waited
                )
            counts = self.data.counts(step, masked)
            self.state.step = step + 1
            self.state.samples += counts.samples
            self._last_result = result
            split = self.timers.end()
            started, ended = ended, time.perf_counter()
            event = StepEvent(
                self.state.step,
                result,
                counts,
                rates,
                ended - started,
                waited,
                split,
                waits,
                memory,
            )
            with self.timers(CHECKPOINT):
                self._committed(self._saver.poll())
            for callback in self._callbacks:
                callback.on_step(self, event)
            if self.stop_agreed and self.state.step < self.total_steps:
                return 128 + signal.SIGTERM
            asked = time.perf_counter()
        return 0

    def _agree(
        self, masked: int, waited: float
    ) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """One small all-reduce: a wish of any rank becomes everybody's decision.

        Returns the masked samples of the global batch (all ranks of a replica see the same ones),
        and of every rank the seconds that it waited for data and its peak memory: a sum where
        each adds to places of its own is a gather.
        """
        ranks, rank = self.ranks.world_size, self.ranks.rank
        wishes = [float(bool(self.stop_reason)), float(self._save_wanted), float(masked)]
        waits, memory = [0.0] * ranks, [0.0] * ranks
        waits[rank], memory[rank] = waited, float(peak_bytes())
        sums = torch.tensor([*wishes, *waits, *memory], device=self.ranks.device)
        dist.all_reduce(sums)
        stop, save, masked_everywhere, *figures = sums.tolist()
        self.stop_agreed, self.save_agreed, self._save_wanted = stop > 0, save > 0, False
        masked = round(masked_everywhere / self.config.parallel.model_ranks)
        return masked, tuple(figures[:ranks]), tuple(figures[ranks:])

    @property
    def writing_seconds(self) -> float | None:
        """Age of the checkpoint that is being written in the background; None without one."""
        return self._saver.seconds_so_far

    def save(self) -> None:
        """Checkpoint the current step; with `parallel.async_checkpoint`, begin to."""
        for callback in self._callbacks:
            callback.on_save(self)
        gather_parameters(self.models)
        started = time.perf_counter()
        self.timers(CHECKPOINT).start()
        if self.config.parallel.async_checkpoint:
            if self.writing_seconds is not None:
                self.say("waits for the checkpoint before, which is still being written")
            self._committed(self._saver.finish())
            self._saver.start(self.state)
        else:
            checkpoint.save(self.state, self.stage_dir, self.config.stage.checkpoint.keep)
        self.timers(CHECKPOINT).stop()
        seconds = time.perf_counter() - started
        for callback in self._callbacks:
            callback.on_saved(self, seconds)

    def _before_commit(self) -> None:
        for callback in self._callbacks:
            callback.on_commit(self)

    def _committed(self, saved: Saved | None) -> None:
        if saved is not None:
            for callback in self._callbacks:
                callback.on_committed(self, saved.seconds)

    def _finish(self) -> None:
        if not self.ranks.reports:
            return
        directory = checkpoint.step_directory(self.stage_dir, self.state.step)
        last, stage = self._last_result, self.config.stage
        write_done(
            self.stage_dir,
            Done(
                stage=stage.name,
                number=stage.number,
                checkpoint=str(directory.relative_to(self.stage_dir)),
                checkpoint_digest=digest_and_fsync(directory / MANIFEST)[1],
                step=self.state.step,
                model=asdict(self.config.model),
                tokenizer_digest=self.data.tokenizer.digest(),
                geometry_digest=self.data.geometry.digest(),
                plan_digest=self.data.plan.digest,
                trained=sorted(trainable_modules(stage.lr)),
                frozen=sorted(frozen_modules(stage.lr)),
                metrics=dict(last.values) if last is not None else {},
                samples=self.state.samples,
            ),
        )
        self.say(f"done: {self.stage_dir / DONE}")
