"""The throw-away Slurm itself: nodes, names, GPUs, accounting, faults, and that nothing stays."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import processes
from tests.slurm.throwaway import ThrowAwaySlurm

pytestmark = pytest.mark.slurm
SHOW = 'echo "$(hostname) $SLURMD_NODENAME $(id -un) ${CUDA_VISIBLE_DEVICES-none}"'


def srun(slurm: ThrowAwaySlurm, *words: str) -> list[list[str]]:
    lines = slurm.run("srun", *words, "sh", "-c", SHOW).stdout.splitlines()
    return sorted(line.split() for line in lines)


def test_two_nodes_with_names_of_their_own(slurm: ThrowAwaySlurm) -> None:
    assert set(slurm.node_states().values()) == {"idle"}
    rows = srun(slurm, "--nodes=2", "--ntasks-per-node=2")
    assert [row[1] for row in rows] == ["cpu1", "cpu1", "cpu2", "cpu2"]
    if slurm.namespaces:
        assert [row[0] for row in rows] == ["cpu1", "cpu1", "cpu2", "cpu2"]
        assert "127.0.0.1" in slurm.run("srun", "getent", "ahostsv4", "cpu4").stdout
    assert {row[3] for row in rows} == {"none"}


def test_gpus_are_counted_and_dealt_out(slurm: ThrowAwaySlurm) -> None:
    rows = srun(slurm, "--partition=acc", "--nodes=2", "--gpus-per-node=4", "--cpus-per-task=80")
    assert [row[1:] for row in rows] == [["acc1", slurm.user, "0,1,2,3"]] + [
        ["acc2", slurm.user, "0,1,2,3"]
    ]
    refused = slurm.run("srun", "--partition=acc", "--gpus-per-node=5", "true", check=False)
    assert "Requested node configuration is not available" in refused.stderr


def test_as_an_ordinary_user(slurm_user: ThrowAwaySlurm) -> None:
    rows = srun(slurm_user, "--partition=acc", "--nodes=2", "--gpus-per-node=2")
    assert [row[1:] for row in rows] == [
        ["acc1", slurm_user.user, "0,1"],
        ["acc2", slurm_user.user, "0,1"],
    ]
    assert slurm_user.user != "root"


def test_accounting_knows_jobs_and_limits(slurm_accounting: ThrowAwaySlurm) -> None:
    slurm = slurm_accounting
    job = slurm.sbatch("--account=ehpc01", "--qos=acc_ehpc", wrap="exit 3")
    assert slurm.wait(job) == "FAILED"
    show = ("sacct", "-nXPj", job, "--format=State,ExitCode,Account")
    end = time.monotonic() + 20
    while (row := slurm.run(*show).stdout.strip()).startswith(("PENDING", "RUNNING")):
        assert time.monotonic() < end, row  # the database lags behind by a second
        time.sleep(0.2)
    assert row == "FAILED|3:0|ehpc01"
    long = ("sbatch", "--qos=acc_debug", "--time=3:00:00", "--wrap=true")
    assert "violates accounting/QOS policy" in slurm.run(*long, check=False).stderr
    foreign = slurm.run("sbatch", "--account=ehpc99", "--wrap=true", check=False)
    assert "Invalid account" in foreign.stderr


def test_preemption_requeues(slurm_accounting: ThrowAwaySlurm) -> None:
    slurm = slurm_accounting
    script = "srun sh -c 'trap \"echo task told\" USR2; echo ready; sleep 60 & wait; sleep 60'"
    everything = ("--nodes=4", "--exclusive", "--open-mode=append", "--signal=USR2@60")
    victim = slurm.sbatch("--qos=acc_ehpc", "--requeue", *everything, wrap=script)
    slurm.wait(victim, "RUNNING")
    end = time.monotonic() + 60
    while "ready" not in slurm.output(victim):  # a task that could hear it
        assert time.monotonic() < end, slurm.output(victim)
        time.sleep(0.1)
    winner = slurm.sbatch("--qos=preemptor", *everything, wrap="sleep 1")
    assert slurm.wait(winner) == "COMPLETED"
    slurm.wait(victim, "RUNNING", timeout=60)
    assert slurm.job(victim)["Restarts"] == "1"
    assert "task told" in slurm.output(victim)


def wait_for_processes(slurm: ThrowAwaySlurm, node: str) -> None:
    """RUNNING comes before the job's first process."""
    end = time.monotonic() + 30
    while not slurm.node_pids(node)["jobs"] and time.monotonic() < end:
        time.sleep(0.05)
    assert slurm.node_pids(node)["jobs"]


def test_killed_nodes_are_noticed_and_come_back(slurm: ThrowAwaySlurm) -> None:
    ids = [
        slurm.sbatch(f"--nodelist={node}", "--no-requeue", wrap="sleep 100")
        for node in ("cpu2", "cpu3")
    ]
    for job, node in zip(ids, ("cpu2", "cpu3"), strict=True):
        slurm.wait(job, "RUNNING")
        wait_for_processes(slurm, node)
    slurm.kill_node("cpu2")
    assert slurm.node_pids("cpu2") == {"slurmd": [], "stepds": [], "jobs": []}
    slurm.kill_node("cpu3", jobs=False)
    orphans = slurm.node_pids("cpu3")["jobs"]
    assert orphans
    for job in ids:
        assert slurm.wait(job, timeout=90) == "NODE_FAIL"
    assert all(processes.alive(pid) for pid in orphans)
    processes.kill(orphans)
    for node in ("cpu2", "cpu3"):
        slurm.restart_node(node)
        assert slurm.run("srun", f"--nodelist={node}", "echo", "back").stdout == "back\n"


def test_nothing_stays(tmp_path: Path) -> None:
    with ThrowAwaySlurm(cpu_nodes=1, acc_nodes=1) as slurm:
        job = slurm.sbatch(wrap="trap '' TERM; setsid sleep 1000 & srun sleep 1000")
        slurm.wait(job, "RUNNING")
        directory = slurm.directory
        wait_for_processes(slurm, "cpu1")
    assert not directory.exists()
    assert not [pid for pid in processes.pids() if str(directory) in processes.command(pid)]
    conf = str(directory / "slurm.conf")
    assert not [p for p in processes.pids() if processes.environment(p).get("SLURM_CONF") == conf]


def test_a_killed_test_run_is_swept_up() -> None:
    program = """
import os, signal
from tests.slurm.throwaway import ThrowAwaySlurm
slurm = ThrowAwaySlurm(cpu_nodes=1, acc_nodes=1).start()
slurm.wait(slurm.sbatch(wrap="sleep 1000"), "RUNNING")
print(slurm.directory, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    directory = Path(killed.stdout.strip())
    assert (directory / "slurm.conf").exists(), killed.stderr
    ThrowAwaySlurm(cpu_nodes=1, acc_nodes=1).stop()
    assert not directory.exists()
    conf = str(directory / "slurm.conf")
    assert not [p for p in processes.pids() if processes.environment(p).get("SLURM_CONF") == conf]


def test_by_hand(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.slurm.throwaway"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused = subprocess.run([*program, tmp_path / "full"], capture_output=True, text=True)
    assert refused.returncode == 1 and "holds other things" in refused.stderr

    started = subprocess.run([*program, tmp_path / "s"], capture_output=True, text=True, timeout=60)
    assert started.stdout == f"export SLURM_CONF={tmp_path / 's' / 'slurm.conf'}\n", started.stderr
    try:
        told = started.stdout.split("=")[1].strip()
        slurm = ThrowAwaySlurm(tmp_path / "s")
        assert slurm.env["SLURM_CONF"] == told
        assert slurm.run("srun", "echo", "ran").stdout == "ran\n"
    finally:
        subprocess.run([*program, tmp_path / "s", "--stop"], check=True, timeout=60)
    assert not slurm._own(daemons=True)
