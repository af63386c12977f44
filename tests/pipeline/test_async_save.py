"""Checkpoints written while training goes on: the same files, and nothing lost."""

import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import Config, ParallelConfig, PrecisionConfig
from pipeline.async_save import AsyncSaver, Saved
from pipeline.checkpoint import TrainingState, load, save, saved_steps, verify
from pipeline.manifest import read_manifest
from tests.distributed import megatron, run_ranks
from tests.pipeline.small_run import SmallRun, losses, start, train
from tests.pipeline.tiny_state import largest_difference, one_step, tensors, tiny_state

TIMEOUT = 120.0
DP2 = ParallelConfig(2, distributed_optimizer=True)
LITTLE = 20_000  # bytes: more than what is not sharded, less than the rest


def _wait(saver: AsyncSaver) -> Saved:
    deadline = time.monotonic() + TIMEOUT
    while (saved := saver.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return saved


def _failure(saver: AsyncSaver, limited: bool = False) -> str:
    """Of a save in progress; what it has written is gone."""
    with pytest.raises(OSError) as error:
        saver.finish()
    assert saver.seconds_so_far is None
    return str(error.value)


def _everything(directory: str) -> None:
    """One state through both ways of saving, and through what goes wrong."""
    waits, goes_on = Path(directory, "waits"), Path(directory, "goes_on")
    with megatron(DP2):
        rank = int(os.environ["RANK"])
        state = tiny_state(DP2, PrecisionConfig(params="bf16"), 1)
        held = tensors(state)
        save(state, waits, keep=1)
        saver = AsyncSaver(goes_on, keep=1)
        saver.start(state)
        for tensor in tensors(state, copies=False):
            tensor.fill_(float("nan"))  # what training does to it meanwhile
        saved = _wait(saver)
        assert (saved.step, saver.poll(), saver.finish()) == (1, None, None)
        _same_files(waits, goes_on)
        load(state, saved.directory, verify(saved.directory))
        assert largest_difference(tensors(state), held) == 0

        _signals_and_overlap(state, saver)
        _writer_killed(state, saver, rank)
        _no_room(state, saver, rank)
        assert saved_steps(goes_on) == [2]
        assert sorted(path.name for path in (goes_on / "checkpoints").iterdir()) == [
            "step_00000002"
        ]
        # And it goes on after a failure, with nothing left over from it, in files of other sizes.
        state = tiny_state(DP2, PrecisionConfig(), 5)
        held = tensors(state)
        saver.start(state)
        again = saver.finish()
        assert again is not None and saved_steps(goes_on) == [5]
        load(state, again.directory, verify(again.directory))
        assert largest_difference(tensors(state), held) == 0


def _same_files(waits: Path, goes_on: Path) -> None:
    ours, theirs = (
        read_manifest(stage / "checkpoints" / "step_00000001") for stage in (goes_on, waits)
    )
    assert ours == replace(theirs, files=ours.files)
    assert set(ours.files) == set(theirs.files) and len(ours.files) >= 4
    for name in set(ours.files) - {".metadata"}:  # a pickle: shares equal strings by chance
        assert ours.files[name] == theirs.files[name]  # SHA-256


def _signals_and_overlap(state: TrainingState, saver: AsyncSaver) -> None:
    """Slurm signals the writer too; a second save waits for the first."""
    one_step(state)
    saver.start(state)
    assert saver._writing is not None
    if saver._writing.process is not None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(saver._writing.process.pid or 0, number)
    with pytest.raises(AssertionError, match="overlap"):
        saver.start(state)
    assert saver.finish() is not None


def _writer_killed(state: TrainingState, saver: AsyncSaver, rank: int) -> None:
    """On one rank, for want of memory for example: all ranks hear of it."""
    one_step(state)
    saver.start(state)
    assert saver._writing is not None
    if rank == 1:
        assert saver._writing.process is not None
        os.kill(saver._writing.process.pid or 0, signal.SIGKILL)
    assert "ended with code -9" in _failure(saver)


def _no_room(state: TrainingState, saver: AsyncSaver, rank: int) -> None:
    """On one rank's disk: all ranks hear of it."""
    one_step(state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE, limits[1]))
    try:
        saver.start(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in _failure(saver)


def test_the_same_checkpoint_and_nothing_lost(tmp_path: Path) -> None:
    run_ranks(2, _everything, str(tmp_path))


def _background(small_run: SmallRun, name: str, *more: str) -> Config:
    return small_run.config("stage1", "parallel.async_checkpoint=true", *more, run=name)


def _when_it_writes(config: Config, stage: Path, number: int) -> str:
    """Signal every process of the run while a checkpoint is being written; its output."""
    leftovers = set(stage.glob("checkpoints/.step*/*.distcp"))
    (process,) = start(config)
    deadline = time.monotonic() + TIMEOUT
    while not set(stage.glob("checkpoints/.step*/*.distcp")) - leftovers:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == (143 if number == signal.SIGTERM else -number), output
    return output


def test_killed_and_stopped_in_the_middle_of_a_write(
    small_run: SmallRun, trained: dict[str, str]
) -> None:
    """SIGKILL, then SIGTERM, to every process of the run; bit for bit the same losses."""
    config = _background(small_run, "background")
    stage = small_run.stage_dir(config)
    _when_it_writes(config, stage, signal.SIGKILL)
    assert not (stage / "DONE.json").exists()
    for folder in (stage / "checkpoints").glob(".step*"):
        assert not (folder / "MANIFEST.json").exists()
    output = _when_it_writes(config, stage, signal.SIGTERM)
    assert "the checkpoint is saved" in output
    assert "resumes after step" in train(config)
    assert losses(config) == losses(small_run.config("stage1"))
    assert saved_steps(stage)[-1] == 6  # the last step's is waited for
    assert not list((stage / "checkpoints").glob(".*"))


def test_a_full_disk_stops_the_run(small_run: SmallRun, trained: dict[str, str]) -> None:
    config = _background(small_run, "background-full")
    (process,) = start(config, file_bytes=100_000)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last
    assert list((small_run.stage_dir(config) / "checkpoints").iterdir()) == []


def test_a_writer_dies_with_its_rank(tmp_path: Path) -> None:
    """Else it would hold a copy of the state beside the run that begins again."""
    from pipeline.async_save import _die_with_parent

    receiver, sender = os.pipe()
    if (rank := os.fork()) == 0:
        if os.fork() == 0:
            _die_with_parent()
            os.write(sender, str(os.getpid()).encode())
            time.sleep(60)
        time.sleep(60)
    writer = int(os.read(receiver, 20))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{writer}/stat").exists():
        if Path(f"/proc/{writer}/stat").read_text().split()[2] == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
