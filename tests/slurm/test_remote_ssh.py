"""The same over a real SSH connection, to an sshd on loopback."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.snapshot import source_files
from tests.slurm.loopback_sshd import REPOSITORY, LoopbackSshd, lacking

DRY = ["verb=submit", "cluster=slurm", "stages=[stage1]", "dry=1", "run=test"]


def committed(target: Path) -> Path:
    """A clean clone of what is being tested, committed or not."""
    for path in source_files(REPOSITORY):
        copy = target / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "all"],
    ):
        subprocess.run(["git", "-C", str(target), *words], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := lacking():
        pytest.skip(reason)
    return committed(tmp_path_factory.mktemp("a clone"))


@pytest.fixture(scope="module")
def sshd(clone: Path) -> Iterator[LoopbackSshd]:
    with LoopbackSshd({}) as sshd:
        yield sshd


def test_the_code_goes_once_and_is_what_runs(sshd: LoopbackSshd, clone: Path) -> None:
    first = sshd.remote(*DRY, repository=clone)
    assert first.returncode == 0, first.stderr
    assert re.match(r"\S+: code [0-9a-f]{12} sent, \d+ kB\n", first.stdout)
    assert "stage1" in first.stdout
    (code,) = (sshd.directory / "code").iterdir()
    assert (code / "slurm" / "submit.py").read_bytes() == (
        clone / "slurm" / "submit.py"
    ).read_bytes()
    second = sshd.remote(*DRY, "model=nonesuch", repository=clone)
    assert second.returncode == 1 and "sent" not in second.stdout
    assert "nonesuch" in second.stderr and second.stderr.count("\n") == 1
    # Not the working tree, and not a copy that somebody edited there.
    changed = clone / "slurm" / "added.py"
    changed.touch()
    third = sshd.remote(*DRY, repository=clone)
    changed.unlink()
    assert third.returncode == 1 and "1 uncommitted: slurm/added.py;" in third.stderr
    (code / "slurm" / "submit.py").write_text("print('edited')\n")
    fourth = sshd.remote(*DRY, repository=clone)
    shutil.rmtree(code)
    assert fourth.returncode == 1 and "was edited since it was sent" in fourth.stderr


def test_an_unknown_or_another_host_key_is_refused(sshd: LoopbackSshd, clone: Path) -> None:
    known = sshd.known_hosts.read_text()
    public = Path(f"{sshd.identity}.pub").read_text().split()[:2]
    try:
        sshd.known_hosts.write_text("")
        unknown = sshd.remote("verb=status", repository=clone)
        assert sshd.known_hosts.read_text() == ""
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {' '.join(public)}\n")
        other = sshd.remote("verb=status", repository=clone)
    finally:
        sshd.known_hosts.write_text(known)
    assert unknown.returncode == other.returncode == 1
    assert "the host key of 127.0.0.1 is not known here (ssh-ed25519 SHA256:" in unknown.stderr
    assert f"ssh-keyscan -p {sshd.port} 127.0.0.1" in unknown.stderr
    assert "is not the one in known_hosts" in other.stderr
    assert unknown.stderr.count("\n") == other.stderr.count("\n") == 1


def test_who_cannot_connect_is_told_why(sshd: LoopbackSshd, clone: Path) -> None:
    stranger = {"HOME": str(sshd.root)}  # without a key; the host is known
    (sshd.root / ".ssh").mkdir()
    shutil.copy(sshd.known_hosts, sshd.root / ".ssh" / "known_hosts")
    for options, env, said in (
        ({"port": "1"}, None, "cannot be reached"),
        ({"host": "no-such-host.invalid"}, None, "its name does not resolve"),
        ({}, stranger, "refuses to log root in" if sshd.user == "root" else "refuses to log"),
    ):
        done = sshd.remote("verb=status", options=options, env=env, repository=clone)
        assert done.returncode == 1 and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
