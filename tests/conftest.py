"""What every test shares: one thread each, no network, and reasons for what is skipped."""

import os
import signal
from typing import Any

# Before anything imports torch: the tests run several at a time on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")

# A shell's background jobs ignore the one, nohup the other; what is tested here must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402

# A real Slurm, for every room: here so that one of a kind serves the whole session.
from tests.slurm.fixtures import (  # noqa: E402, F401
    slurm,
    slurm_accounting,
    slurm_accounting_session,
    slurm_session,
    slurm_user,
    slurm_user_session,
)


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device on this machine"


def _no_slurm() -> str:
    from tests.slurm.throwaway import lacking

    return lacking()


NEEDS = {"gpu": _no_gpu, "slurm": _no_slurm}


# Rooms whose tests share what is costly to make (processes with torch in them, a trained run, a
# Slurm): one worker of pytest-xdist takes all of a group.
GROUPS = {
    "models": "ranks",
    "parity": "ranks",
    "pipeline": "training",
    "slurm": "slurm",
    "faults": "faults",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep rooms together (the marks of `--dist loadgroup` are lost since pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class RoomScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            room = nodeid.removeprefix("tests/").split("/")[0]
            return GROUPS.get(room, nodeid)

    return RoomScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, tests whose machine this is not."""
    for marker, lacking in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = lacking() if marked else ""
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
