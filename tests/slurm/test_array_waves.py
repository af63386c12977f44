"""How many elements, items and waves; the jobs that they become."""

from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from slurm.array_items import TaskFolder, group
from slurm.array_queue import queued
from slurm.array_tasks import TASKS
from slurm.array_waves import (
    Share,
    array_job,
    items_per_element,
    next_wave_job,
    share,
)
from slurm.commands import QueuedJob
from tests.slurm.array_toys import item, wave_of


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder.of(tmp_path / "run", "commands")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = compose([f"runs_dir={tmp_path / 'runs'}", "run=r", f"data.root={tmp_path / 'data'}"])
    config.cluster.executor = "slurm"
    return config


@pytest.mark.parametrize(
    ("elements", "room", "largest", "expected"),
    [
        (300, None, None, Share(300, False)),
        (300, 300, 1001, Share(300, False)),
        (300, 100, 1001, Share(99, True)),  # the next wave's job counts too
        (100, 100, 1001, Share(100, False)),
        (101, 100, 1001, Share(99, True)),
        (300, None, 250, Share(250, True)),
        (300, 251, 250, Share(250, True)),
        (300, 250, 250, Share(249, True)),
        (2000, None, None, Share(1000, True)),
        (2, 1, None, Share(1, False)),  # nobody can submit the rest
        (1, 1, None, Share(1, False)),
        (5, 0, None, Share(0, False)),
        (5, -3, None, Share(0, False)),
    ],
)
def test_share(elements: int, room: int | None, largest: int | None, expected: Share) -> None:
    assert share(elements, room, largest) == expected


def test_waves_of_300_under_a_limit_of_100() -> None:
    """While a next wave is submitted, its own job still counts."""
    left, waves = 300, []
    while left:
        part = share(left, 100 - (1 if waves else 0), 1001)
        assert part.now + part.chained + (1 if waves else 0) <= 100
        waves.append(part.now)
        left -= part.now
        assert part.chained == bool(left)
    assert waves == [99, 98, 98, 5]


@pytest.mark.parametrize(
    ("items", "elements", "room", "largest", "expected"),
    [
        (10, None, None, None, 1),
        (32, None, None, None, 1),
        (33, None, None, None, 2),  # 8 at once, 4 rounds
        (1000, None, None, None, 32),
        (1000, None, 10, None, 100),
        (1000, None, None, 20, 50),
        (1000, None, 0, None, 1000),
        (300, 300, 100, 1001, 1),  # what is asked for is given, in waves
        (300, 100, None, None, 3),
        (3, 100, None, None, 1),
    ],
)
def test_items_per_element(
    items: int, elements: int | None, room: int | None, largest: int | None, expected: int
) -> None:
    assert items_per_element(items, elements, 8, room, largest) == expected


def test_group_keeps_order_and_loses_nothing() -> None:
    items = [item(f"i{number}") for number in range(7)]
    elements = group(items, 3)
    assert [len(element) for element in elements] == [3, 3, 1]
    assert [one for element in elements for one in element] == items


def test_jobs_of_a_wave(config: Config, folder: TaskFolder) -> None:
    cluster = config.cluster
    cluster.gpus_per_node, cluster.cpus_per_node, cluster.hours = 4, 80, 12.0
    wave = wave_of((item("a"),), (item("b"),))
    job = array_job(config, TASKS["validate"], wave, folder, 8)
    assert (job.nodes, job.gpus_per_node, job.elements, job.throttle) == (1, 0, 2, 8)
    assert not job.exclusive
    last = next_wave_job(config, wave, job)
    assert last.after_any == (job.name,) and last.kind == "next_wave"
    assert last.directory.name == "001-next" and last.hours <= 0.25
    assert array_job(config, TASKS["evaluate"], wave, folder, 8).gpus_per_node == 1
    cluster.site.single_gpus = 1
    job = array_job(config, TASKS["validate"], wave, folder, 8)
    assert (job.gpus_per_node, job.cpus_per_rank) == (1, 20)
    config.parallel.world_size = 8
    job = array_job(config, TASKS["reference"], wave, folder, 8)
    assert (job.nodes, job.ranks_per_node, job.gpus_per_node) == (2, 4, 4)
    assert "export MASTER_ADDR" in job.body and "export MASTER_PORT" in job.body


def row(name: str, index: int | None, job_id: str = "7", reason: str = "None") -> QueuedJob:
    return QueuedJob(
        job_id=job_id, array_index=index, name=name, state="PENDING", reason=reason, comment="",
        user="u", partition="p", submitted=None, start=None, used=0.0, left=None, nodes=1,
        node_list="", dependency="",
    )  # fmt: skip


def test_what_is_queued_is_known_by_item(config: Config, folder: TaskFolder) -> None:
    folder.wave(3).mkdir(parents=True)
    wave_of((item("a"), item("b")), (item("c"),), number=3).write(folder.wave(3))
    rows = [row("r.commands.003", 1), row("r.stage1.001", None), row("r.validate.003", 0)]
    found = queued(folder, config, rows, own_id="")
    assert set(found.items) == {"c"} and not found.next_job and not found.held
    rows += [row("r.commands.003", 0), row("r.commands.003.next", None, job_id="8")]
    found = queued(folder, config, rows, own_id="")
    assert set(found.items) == {"a", "b", "c"} and found.next_job == "8"
    assert found.arrays == ("7",) and found.newest == 3
    assert queued(folder, config, rows, own_id="8").next_job == ""
    held = [row("r.commands.003", 0, reason="JobHeldUser")]
    assert queued(folder, config, held, own_id="").held == ("7",)
