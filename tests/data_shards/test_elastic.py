"""Replicas killed with -9 at random, again and again, and gone on with in other numbers deliver
every global batch exactly once, bit for bit: real processes, the real loader, no model."""

import dataclasses
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_shards.manifest import read_manifest
from tests.data_shards import loader_process
from tests.data_shards.conftest import World
from tests.data_shards.loader_process import Settings
from tests.data_shards.test_reader import copied, flip, shard_of
from tests.fork_server import Forked, ForkServer

STEPS, BATCH, EVERY = 24, 12, 2  # a checkpoint every 2 steps
# (replicas, packs of a micro-batch) of one start after the other
LAYOUTS = [(1, 1), (4, 1), (3, 2), (2, 3), (6, 2), (2, 1), (3, 4), (1, 3), (12, 1)]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(loader_process.__name__) as server:
        yield server


def delivered(settings: Settings) -> list[tuple[int, list[str]]]:
    """What one replica has written down, a line cut short left out."""
    path = Path(settings.out)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def start(server: ForkServer, settings: Settings) -> Forked:
    given = Path(f"{settings.out}.json")
    given.write_text(json.dumps(dataclasses.asdict(settings)))
    log = Path(f"{settings.out}.log")
    return server.start(loader_process.__name__, [str(given)], {}, log)


def test_every_batch_once_on_any_number_of_replicas(
    world: World, server: ForkServer, tmp_path: Path
) -> None:
    root = tmp_path / "shards"
    for name in ("chats", "more"):
        copied(world, name, root)
    damaged = read_manifest(root / "chats" / "manifest.parquet")
    flip(shard_of(damaged, 3), int(damaged.image_span[damaged.first_image[3], 0]) + 9)
    alone = Settings(str(root), world.data.tokenizer, STEPS, BATCH, 0, 1, 1, 0, 0, STEPS, "")
    expected = [
        Counter(digest for batch in found for digest in loader_process.packs_of(batch, 512))
        for _, found in loader_process.batches(alone)
    ]
    assert len(expected) == STEPS and all(batch.total() == BATCH for batch in expected)

    shutil.rmtree(root / "plan")  # the first start makes it again, unless it is killed meanwhile
    chance, deadline = random.Random(5), time.monotonic() + 120
    resumed, begun = 0, 0
    once, got_on = Counter[int](), set()
    while resumed < STEPS:
        size, micro = LAYOUTS[begun % len(LAYOUTS)]
        early = begun % 3 == 1  # killed before all replicas have got anywhere
        goal = chance.randrange(2) if early else chance.randint(EVERY, 2 * EVERY)
        replicas = [
            dataclasses.replace(
                alone,
                rank=rank,
                size=size,
                micro_batch_size=micro,
                workers=chance.randrange(3),
                start=resumed,
                hold=goal + chance.randrange(2),
                out=str(tmp_path / f"{begun}-{rank}"),
            )
            for rank in range(size)
        ]
        running = [start(server, settings) for settings in replicas]
        for settings in replicas[:1] if early else replicas:
            while len(delivered(settings)) < min(goal, STEPS - resumed):
                assert time.monotonic() < deadline, [process.output() for process in running]
                time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        for process in chance.sample(running, size):
            process.kill()
        codes = [process.wait(60) for process in running]
        assert set(codes) <= {0, -9}, [process.output() for process in running]
        found = [delivered(settings) for settings in replicas]
        complete = min(len(lines) for lines in found)  # steps that every replica has ended
        for number in range(max(map(len, found))):
            parts = [lines[number] for lines in found if number < len(lines)]
            assert {step for step, _ in parts} == {resumed + number}
            assert all(len(digests) == BATCH // size for _, digests in parts)
            batch = Counter(digest for _, digests in parts for digest in digests)
            assert batch <= expected[resumed + number]
            assert (batch == expected[resumed + number]) == (len(parts) == size)
        reached = resumed + complete
        checkpoint = reached if reached == STEPS else reached - reached % EVERY
        if checkpoint > resumed:
            got_on.add((size, micro))
        once.update(range(resumed, checkpoint))
        resumed, begun = max(resumed, checkpoint), begun + 1
    assert once == Counter(range(STEPS)) and len(got_on) > 3
