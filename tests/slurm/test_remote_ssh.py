"""The same over a real SSH connection, to an sshd on loopback."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf.compose import compose
from conf.snapshot import source_files
from tests.slurm import processes
from tests.slurm.loopback_sshd import REPOSITORY, LoopbackSshd, lacking
from tests.slurm.throwaway import ThrowAwaySlurm

DRY = ["verb=submit", "cluster=slurm", "stages=[stage1]", "dry=1", "run=test"]


# In place of the ranks' program: one step, one checkpoint and the end; waits where it is told to.
TRAIN = """
import hashlib, json, os, pathlib, sys, time
stage = pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).parent
sys.stdout.write(f"step 1 of {stage.parent.name} {os.environ['PYTHONPATH']}\\n")
while (stage.parent / "wait").exists():
    time.sleep(0.2)
checkpoint = stage / "checkpoints" / "step_00000001"
checkpoint.mkdir(parents=True, exist_ok=True)
manifest = checkpoint / "MANIFEST.json"
manifest.write_text(json.dumps({"files": {}}))
(stage / "DONE.json").write_text(json.dumps({
    "format": 1, "checkpoint": "checkpoints/step_00000001",
    "checkpoint_digest": hashlib.sha256(manifest.read_bytes()).hexdigest()}))
"""


def committed(target: Path) -> Path:
    """A clean clone of what is being tested, committed or not; but its ranks do nothing."""
    for path in source_files(REPOSITORY):
        copy = target / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (target / "pipeline" / "train.py").write_text(TRAIN)
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


# --- with a Slurm behind it ------------------------------------------------------------------


@pytest.fixture
def cluster(slurm: ThrowAwaySlurm, clone: Path) -> Iterator[LoopbackSshd]:
    """A login node: its Slurm, the shards and the imported weights are there."""
    with LoopbackSshd({"SLURM_CONF": slurm.env["SLURM_CONF"]}) as sshd:
        for name in compose([]).data.sources:
            (sshd.directory / "shards" / name).mkdir(parents=True)
        (sshd.directory / "tokenizer").mkdir()
        for run in ("one", "two"):
            (sshd.directory / "runs" / run / "import").mkdir(parents=True)
            (sshd.directory / "runs" / run / "import" / "DONE.json").write_text("{}")
        yield sshd


PIPELINE = [
    *("verb=submit", "cluster=slurm", "stages=[stage1,stage2,stage3]", "cluster.preflight=false"),
    *("data.root=shards", "data.tokenizer=tokenizer", "yes=true"),
]


def until(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.2)
    return what()


@pytest.mark.slurm
def test_three_stages_from_a_laptop(
    cluster: LoopbackSshd, clone: Path, slurm: ThrowAwaySlurm
) -> None:
    submitted = cluster.remote(*PIPELINE, "run=one", repository=clone)
    assert submitted.returncode == 0, submitted.stderr
    run = cluster.directory / "runs" / "one"
    assert until(lambda: (run / "stage3" / "DONE.json").exists(), 120), _logs(run)
    record = json.loads(next(run.glob("stage1/segments/*/job.json")).read_text())
    assert record["job_id"] in submitted.stdout
    assert "commit " + _head(clone) in (run / "env.txt").read_text()
    # The jobs ran the run's snapshot of the code that was sent.
    logs = cluster.remote("verb=logs", "run=one", "stage=stage2", repository=clone)
    assert logs.returncode == 0 and f"step 1 of one {run}/code" in logs.stdout
    status = cluster.remote("verb=status", "run=one", "refresh=true", repository=clone)
    assert status.returncode == 0, status.stderr
    for stage in ("stage1", "stage2", "stage3"):
        assert re.search(rf"^{stage} +done", status.stdout, re.MULTILINE), status.stdout


@pytest.mark.slurm
def test_following_and_cancelling_from_a_laptop(
    cluster: LoopbackSshd, clone: Path, slurm: ThrowAwaySlurm
) -> None:
    run = cluster.directory / "runs" / "two"
    (run / "wait").touch()
    submitted = cluster.remote(*PIPELINE, "run=two", repository=clone)
    assert submitted.returncode == 0, submitted.stderr
    with subprocess.Popen(
        cluster.words("verb=logs", "run=two", "follow=true"),
        cwd=clone,
        env=cluster.laptop(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as follower:
        try:
            assert follower.stdout is not None
            followed = next((line for line in follower.stdout if "step 1 of two" in line), "")
            assert followed and "\r" not in followed
            assert _followers(cluster)
        finally:
            follower.kill()  # the laptop is closed
    # Nothing of it stays on the login node.
    assert until(lambda: not _followers(cluster), 20), _followers(cluster)

    cancelled = cluster.remote("verb=cancel", "run=two", "now=true", repository=clone)
    assert cancelled.returncode == 0, cancelled.stderr
    queued = ("squeue", "--noheader", "--format=%j %T")
    assert until(lambda: "two." not in slurm.run(*queued).stdout, 30), slurm.run(*queued).stdout
    assert not (run / "stage1" / "DONE.json").exists()


def _followers(cluster: LoopbackSshd) -> list[str]:
    """Command lines of what follows a log on the login node."""
    commands = [processes.command(pid) for pid in processes.pids()]
    return [line for line in commands if "slurm.logs run=two" in line and "ssh" not in line]


def _logs(run: Path) -> str:
    return "\n".join(f"{path}:\n{path.read_text()}" for path in run.rglob("log.out"))


def _head(repository: Path) -> str:
    words = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
