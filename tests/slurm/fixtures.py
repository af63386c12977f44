"""Fixtures of a real Slurm. One cluster of a kind serves a whole session (an xdist worker each).

A test takes `slurm` (or `slurm_accounting`, `slurm_user`): the cluster as at its beginning, with
SLURM_CONF set in this process too; after the test its jobs are cancelled and its nodes repaired.
Fixtures of a wider scope take `slurm_session`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.throwaway import ThrowAwaySlurm, lacking

ORDINARY_USER = "nobody"


def _cluster(accounting: bool = False, user: str | None = None) -> Iterator[ThrowAwaySlurm]:
    reason = lacking(accounting, user)
    if reason:
        pytest.skip(reason)
    with ThrowAwaySlurm(accounting=accounting, user=user) as slurm:
        yield slurm


def _lent(slurm: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThrowAwaySlurm]:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", slurm.env["PATH"])
    for name in ("SLURM_ACCOUNT", "SLURM_QOS"):
        monkeypatch.delenv(name, raising=False)
    yield slurm
    slurm.clean()


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[ThrowAwaySlurm]:
    """Slurm without accounting, as whoever runs the tests."""
    yield from _cluster()


@pytest.fixture(scope="session")
def slurm_accounting_session() -> Iterator[ThrowAwaySlurm]:
    """Slurm with slurmdbd, accounts, QoS and preemption."""
    yield from _cluster(accounting=True)


@pytest.fixture(scope="session")
def slurm_user_session() -> Iterator[ThrowAwaySlurm]:
    """Slurm of an ordinary user, who cannot read root's files (nor a Python below /root)."""
    yield from _cluster(user=ORDINARY_USER if os.geteuid() == 0 else None)


@pytest.fixture
def slurm(
    slurm_session: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThrowAwaySlurm]:
    yield from _lent(slurm_session, monkeypatch)


@pytest.fixture
def slurm_accounting(
    slurm_accounting_session: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThrowAwaySlurm]:
    yield from _lent(slurm_accounting_session, monkeypatch)


@pytest.fixture
def slurm_user(
    slurm_user_session: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ThrowAwaySlurm]:
    yield from _lent(slurm_user_session, monkeypatch)
