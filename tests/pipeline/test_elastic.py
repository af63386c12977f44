"""Killed with -9 at random moments and gone on with on other numbers of replicas, a run receives
the same global batches: checked on the bytes that the model is given."""

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conf.schema import Config
from data_shards.manifest import read_manifest
from pipeline.batch import DeviceBatch
from pipeline.data import open_data
from pipeline.distributed import Ranks
from tests.fork_server import Forked, ForkServer
from tests.pipeline.forked_training import digest, start_forked
from tests.pipeline.small_run import SmallRun, losses, metrics

STEPS, BATCH, EVERY = 14, 12, 2
REPLICAS = (1, 2, 3, 4, 1, 3)  # of the attempts, in turn; the last one may end
TIMEOUT = 120.0
# Layouts sum float32 numbers in other orders (tests/pipeline/test_training.py).
LAYOUT_TOLERANCE = 1e-5

pytestmark = pytest.mark.slow


class Recorded:
    """One start of all ranks of a run."""

    def __init__(self, server: ForkServer, config: Config, folder: Path) -> None:
        self.size, self._folder = config.parallel.world_size, folder
        words = ("--record", str(folder / "record"))
        self.ranks: list[Forked] = start_forked(server, config, folder, *words)

    def passes(self) -> list[list[tuple[int, str]]]:
        """Of each rank, the (step, digest) of every forward pass so far."""
        found = []
        for rank in range(self.size):
            lines = [
                json.loads(line)
                for path in self._folder.glob(f"record-{rank}-*.jsonl")
                for line in path.read_text().splitlines()
            ]
            found.append([(step, value) for step, value in lines])
        return found

    def by_step(self) -> dict[int, Counter[str]]:
        """What all ranks together received at each step."""
        steps: dict[int, Counter[str]] = {}
        for step, value in (one for rank in self.passes() for one in rank):
            steps.setdefault(step, Counter())[value] += 1
        return steps

    def kill_after(self, passes: int, delay: float, first: int | None) -> None:
        """SIGKILL once rank 0 has begun so many passes and `delay` seconds went by; one rank some
        time before the others, or all at once."""
        deadline = time.monotonic() + TIMEOUT
        while len(self.passes()[0]) < passes and self.ranks[0].poll() is None:
            assert time.monotonic() < deadline, self.ranks[0].output()
            time.sleep(0.005)
        time.sleep(delay)
        if first is not None:
            self.ranks[first].kill()
            time.sleep(0.05)
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait(TIMEOUT)

    def finish(self) -> None:
        codes = [rank.wait(TIMEOUT) for rank in self.ranks]
        assert codes == [0] * self.size, self.ranks[0].output()


def configured(run: SmallRun, root: Path, replicas: int, name: str) -> Config:
    """Stage 2 on `replicas` processes, from data sets under `root`."""
    config = run.config(
        "stage2",
        f"stage.steps={STEPS}",
        f"stage.global_batch_size={BATCH}",
        f"stage.checkpoint.every={EVERY}",
        f"init_from={run.root / 'run' / 'stage1'}",
        f"parallel={'single' if replicas == 1 else 'dp2'}",
        f"parallel.world_size={replicas}",
        run=name,
    )
    config.data = replace(config.data, root=str(root))
    return config


def damaged_copy(run: SmallRun, folder: Path) -> Path:
    """The data sets with one bit of one picture turned over: a sample that will be masked."""
    root = shutil.copytree(run.data.root, folder / "shards")
    manifest = read_manifest(root / "chats" / "manifest.parquet")
    shard = manifest.shards_directory / manifest.info.shards[manifest.shard[0]].name
    offset = int(manifest.image_span[0, 0]) + 100
    with open(shard, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    return root


def expected_batches(config: Config) -> list[Counter[str]]:
    """Of each step, the digests of its packs, by the loader alone."""
    ranks = Ranks(0, 1, torch.device("cpu"), 0, 1, 0, 1, True, True, True)
    data = open_data(config, ranks)
    return [
        Counter(digest(DeviceBatch.from_packed(b, ranks.device).model_inputs()) for b in batches)
        for _, batches in data.batches(0)
    ]


def newest_checkpoint(stage_dir: Path) -> int:
    """The last step with a whole checkpoint; 0 without one."""
    found = stage_dir.glob("checkpoints/step_*/MANIFEST.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in found), default=0)


def test_same_bytes_on_any_number_of_replicas(
    small_run: SmallRun, stage1_dir: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    root = damaged_copy(small_run, tmp_path)
    unbroken = configured(small_run, root, 1, "whole")
    expected = expected_batches(unbroken)
    whole = Recorded(fork_server, unbroken, tmp_path / "whole")
    assert len(expected) == STEPS and all(batch.total() == BATCH for batch in expected)
    assert len({frozenset(batch) for batch in expected}) == STEPS, "no two steps are alike"
    whole.finish()
    assert whole.by_step() == dict(enumerate(expected))

    chance = random.Random(20261121)
    stage_dir = small_run.stage_dir(configured(small_run, root, 1, "elastic"))
    starts: list[tuple[int, Recorded]] = []
    for number, replicas in enumerate(REPLICAS):
        resumed = newest_checkpoint(stage_dir)
        assert resumed < STEPS
        config = configured(small_run, root, replicas, "elastic")
        attempt = Recorded(fork_server, config, tmp_path / f"attempt{number}")
        starts.append((resumed, attempt))
        if number == len(REPLICAS) - 1:
            attempt.finish()
            break
        share = BATCH // replicas
        passes = chance.randrange(EVERY * share + 1, (EVERY + 2) * share)
        one = chance.choice([None, *range(replicas)])
        attempt.kill_after(passes, chance.uniform(0, 0.1), one)

    ends = [resumed for resumed, _ in starts[1:]] + [STEPS]
    got_on = {start[1].size for start, end in zip(starts, ends, strict=True) if start[0] < end}
    assert got_on == {1, 2, 3, 4}
    for (resumed, attempt), end in zip(starts, ends, strict=True):
        found = attempt.by_step()
        assert list(found) == list(range(resumed, resumed + len(found)))
        for step, batch in found.items():
            if step < max(found) or step < end:  # ranks begin a step when all have ended the last
                assert batch == expected[step], step
            assert batch <= expected[step]
        # What was learned from: from this start's checkpoint to the next one's, every step once.
        assert set(range(resumed, end)) <= set(found)
        for rank in attempt.passes():
            done = Counter(step for step, _ in rank)
            assert all(done[step] == BATCH // attempt.size for step in range(resumed, end))
    lines = metrics(config)
    assert losses(config) == pytest.approx(losses(unbroken), abs=LAYOUT_TOLERANCE)
    masked = [line["masked"] for line in lines]
    assert masked == [line["masked"] for line in metrics(unbroken)] and sum(masked) >= 1


def test_stops_at_the_limit_of_masked_samples(
    small_run: SmallRun, stage1_dir: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    """The one bad picture of the copy is one too many; the last line names it, and the file."""
    config = configured(small_run, damaged_copy(small_run, tmp_path), 1, "limit")
    config.data = replace(config.data, max_masked=0)
    (rank,) = start_forked(fork_server, config, tmp_path / "limit")
    assert rank.wait(TIMEOUT) == 1
    last = rank.output().splitlines()[-1]
    assert last.startswith("error: more than data.max_masked=0 samples had bad bytes")
    assert ".tar: sample 000000000 (row 0): CRC-32 of its image 0 differs" in last
