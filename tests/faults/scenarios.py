"""What clusters do to jobs, each as one function on a pipeline that has been submitted.

A scenario waits until a stage has passed its first checkpoint, does its harm, and does what a user
or sysadmin would (bring a node back, submit again), nothing more. Whoever calls waits for the end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from tests.faults.pipeline_run import EVERY, PipelineRun
from tests.slurm import processes

Fault = Callable[[PipelineRun, str, int], None]
FIRST = EVERY + 1  # step at which a fault comes: past the first checkpoint
# Long enough for a job that lost its node, or waits for its old credential, to run again.
PATIENCE = 180


def walltime_warns(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """The walltime is too short for the stage, whose ranks are slow until Slurm warns them."""
    job = run.until_step(stage, step)
    ranks = run.ranks(job).values()
    stop(ranks)  # until the warning, which comes with a SIGCONT
    run.until(lambda: run.over(job), f"the end of job {job}", PATIENCE)
    assert run.slurm.state(job) == "COMPLETED", run.slurm.job(job)


def walltime_ends(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """The walltime ends while the ranks hang, whatever they are told: Slurm kills them."""
    job = run.until_step(stage, step)
    ranks = run.ranks(job).values()

    def over() -> bool:
        stop(ranks)
        return run.over(job)

    run.until(over, f"the end of job {job}", PATIENCE)
    assert run.slurm.state(job) == "TIMEOUT", run.slurm.job(job)


def requeued(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """`scontrol requeue`, as sysadmins do before maintenance."""
    job = run.until_step(stage, step)
    run.slurm.run("scontrol", "requeue", job)
    run.until(lambda: run.restarts(job) == 1, f"restart of job {job}", PATIENCE)


def preempted(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """A job of a QoS that goes before ours takes our nodes for some seconds."""
    nodes = run.nodes(run.until_step(stage, step))
    words = ("--qos=preemptor", f"--nodelist={','.join(nodes)}", "--exclusive")
    job = run.slurm.sbatch(f"--nodes={len(nodes)}", *words, wrap="sleep 2")
    assert run.slurm.wait(job, timeout=PATIENCE) == "COMPLETED"


def rank_killed(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """kill -9 of rank 1, as the kernel does when memory is out."""
    job = run.until_step(stage, step)
    os.kill(run.ranks(job)[1], signal.SIGKILL)


def ranks_killed(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """kill -9 of every rank at once."""
    job = run.until_step(stage, step)
    processes.kill(run.ranks(job).values())


def node_dies(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """The second node loses its slurmd and all processes; it comes back later."""
    _node_dies(run, stage, step, 1)


def first_node_dies(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """The node of the batch script and rank 0 loses its slurmd and all processes."""
    _node_dies(run, stage, step, 0)


def _node_dies(run: PipelineRun, stage: str, step: int, which: int) -> None:
    job = run.until_step(stage, step)
    node = run.nodes(job)[which]
    run.slurm.kill_node(node)
    run.until(lambda: run.noticed(job), f"Slurm noticing that {node} is dead", PATIENCE)
    run.slurm.restart_node(node)


def all_nodes_die(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """Every node of the job dies at once, as a rack does; where Slurm gives up, so does the user.

    Slurm 22.05 requeues an exclusive job and then holds it for ever (BadConstraints), whatever
    comes back or is released; `make status` says what helps.
    """
    job = run.until_step(stage, step)
    nodes = run.nodes(job)
    for node in nodes:
        run.slurm.kill_node(node)
    run.until(lambda: run.noticed(job), f"Slurm noticing that {nodes} are dead", PATIENCE)
    time.sleep(2)
    if run.slurm.job(job)["Reason"] == "BadConstraints":
        run.slurm.run("scancel", job)
    for node in nodes:
        run.slurm.restart_node(node)


def orphans_wake_up(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """Both nodes hang, Slurm gives the job to others, then the old ranks wake up and go on.

    Only slurmd and slurmstepd are dead: nobody stops the old ranks but they themselves.
    """
    job = run.until_step(stage, step)
    nodes = run.nodes(job)
    old = run.ranks(job)
    # Daemons first: the kernel wakes up, and ends, stopped processes that lose their parent.
    for node in nodes:
        run.slurm.kill_node(node, jobs=False)
    hung = [pid for node in nodes for pid in run.slurm.node_pids(node)["jobs"]]
    stop(hung)
    assert set(old.values()) <= set(hung), (old, hung)
    before = run.attempts(stage)
    run.until(lambda: run.attempts(stage) > before, "a new attempt on other nodes", PATIENCE)
    new = run.running(stage)
    run.until(lambda: len(run.ranks(new, but=old.values())) == 2, "new ranks", PATIENCE)
    for pid in hung:
        if processes.alive(pid):
            os.kill(pid, signal.SIGCONT)
    gone = time.monotonic() + 60
    while left := [pid for pid in old.values() if processes.alive(pid)]:
        assert time.monotonic() < gone, f"old ranks {left} go on\n{run.explain()}"
        time.sleep(0.1)
    for node in nodes:
        run.slurm.restart_node(node)


def node_downed(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """A sysadmin sets a node of the job down, and resumes it later."""
    job = run.until_step(stage, step)
    node = run.nodes(job)[-1]
    run.slurm.update_node(node, "down", "replace the fan")
    run.until(lambda: run.noticed(job), f"the end of job {job} on {node}", PATIENCE)
    run.slurm.restart_node(node)


def cancelled(run: PipelineRun, stage: str, step: int = FIRST) -> None:
    """The user cancels the running job, sees that nothing goes on, and submits again."""
    job = run.until_step(stage, step)
    run.slurm.run("scancel", *[id for id, (_, name) in run.jobs().items() if stage in name])
    end = time.monotonic() + PATIENCE
    while run.alive():
        assert time.monotonic() < end, f"jobs go on after {job} was cancelled\n{run.explain()}"
        time.sleep(0.2)
    run.submit()


def checkpoint_truncated(run: PipelineRun, stage: str, step: int = 2 * EVERY) -> None:
    """The newest checkpoint loses the end of a file while the job is requeued."""
    job = run.until_checkpoint(stage, step)
    run.slurm.run("scontrol", "requeue", job)
    run.until(lambda: not run.ranks(job), f"the end of the ranks of job {job}", PATIENCE)
    newest = max((run.root / stage / "checkpoints").glob("step_*/MANIFEST.json")).parent
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    run.until(lambda: "passed over a damaged checkpoint" in run.log(stage), "a warning", PATIENCE)


def stop(pids: Iterable[int]) -> None:
    """Freeze processes, as a file system does that hangs."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


# Slurm keeps time in minutes, and warns a minute before the end or half a minute earlier still.
SHORT = ("stage2:cluster.hours=0.03334", "stage2:cluster.stop_minutes=0.4")


@dataclass(frozen=True)
class Scenario:
    """A fault, and the stage that it meets when it runs alone."""

    fault: Fault
    stage: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.fault.__name__

    @property
    def title(self) -> str:
        return str(self.fault.__doc__).split("\n")[0].rstrip(".")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(walltime_warns, "stage2", SHORT),
        Scenario(walltime_ends, "stage2", SHORT),
        Scenario(requeued, "stage1"),
        Scenario(preempted, "stage2"),
        Scenario(rank_killed, "stage2"),
        Scenario(ranks_killed, "stage3"),
        Scenario(node_dies, "stage2"),
        Scenario(first_node_dies, "stage1"),
        Scenario(all_nodes_die, "stage3"),
        # Shared nodes, for the reason that all_nodes_die gives.
        Scenario(orphans_wake_up, "stage2", ("cluster.exclusive=false",)),
        Scenario(node_downed, "stage3"),
        Scenario(cancelled, "stage2"),
        Scenario(checkpoint_truncated, "stage1"),
    )
}
