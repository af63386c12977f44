"""One small run, trained once, for all tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fork_server import ForkServer
from tests.pipeline.forked_training import MODULES
from tests.pipeline.small_run import SmallRun, train_in_pool


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """Import and shards."""
    return SmallRun(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def trained(small_run: SmallRun) -> dict[str, str]:
    """Output of each stage of run `run`, on one rank, one after the other."""
    return {
        stage: train_in_pool(small_run.config(stage)) for stage in ("stage1", "stage2", "stage3")
    }


@pytest.fixture(scope="session")
def stage1_dir(small_run: SmallRun, trained: dict[str, str]) -> Path:
    """A finished stage 1, to start stage 2 of other runs from."""
    return small_run.root / "run" / "stage1"


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts training processes that have torch imported already."""
    with ForkServer(*MODULES) as server:
        yield server
