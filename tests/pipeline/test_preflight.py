"""Preflight on gloo ranks that believe to be nodes, each with something wrong in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.compose import compose
from conf.schema import Config
from pipeline.preflight import node
from pipeline.preflight.bandwidth import ring, slow_places
from pipeline.preflight.checkpoint_size import checkpoint_bytes, checkpoint_files, parameters
from pipeline.preflight.meeting import judge, judge_clocks
from pipeline.preflight.report import Problem, Verdict
from pipeline.preflight.together import planned_nodes
from slurm.preflight_report import blamed
from slurm.run_directory import RunDirectory
from tests.distributed import free_port
from tests.pipeline.small_run import REPOSITORY, SmallRun

TIMEOUT = 100.0


@dataclass
class Outcome:
    codes: list[int]
    said: list[str]  # stderr of each rank
    printed: str  # stdout of rank 0
    report: Path

    def rank(self, number: int) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.report / f"rank_{number}.json").read_text())
        return value

    @property
    def bad_nodes(self) -> dict[str, str]:
        path = self.report / "bad_nodes.json"
        return dict(json.loads(path.read_text())["nodes"]) if path.is_file() else {}


class World:
    """A recorded run with the files that preflight looks at."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        self.config: Config = compose(
            [
                "stage=stage1",
                "model=tiny",
                "data=demo",
                "cluster=local",
                "parallel.world_size=2",
                "run=test",
                f"runs_dir={root / 'runs'}",
                *overrides,
            ]
        )
        self.run_dir = RunDirectory.of(self.config)
        self.run_dir.record({"stage1": self.config}, {"format": 1})
        for name in self.config.data.mix["stage1"]:
            manifest = Path(self.config.data.root) / name / "index" / "index.json"
            manifest.parent.mkdir(parents=True)
            manifest.write_bytes(b"rows of " + name.encode())
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, faults: list[str], meet: float = 60.0, **variables: str) -> Path:
        """One process a rank, each a node of its own, rank N with faults[N]."""
        report = self.root / "preflight"
        port = str(free_port())
        for rank, fault in enumerate(faults):
            environment = {
                **os.environ,
                "PYTHONPATH": f"{self.run_dir.root / 'code'}:{REPOSITORY}",
                "PYTHONSAFEPATH": "1",
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": str(len(faults)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "SLURMD_NODENAME": f"n{rank}",
                "SLURM_STEP_NODELIST": f"n[0-{len(faults) - 1}]",
                "SLURM_STEP_TASKS_PER_NODE": f"1(x{len(faults)})",
                "ATTEMPT_ID": "7-0-1",
                "MEET_SECONDS": str(meet),
                **variables,
            }
            command = [sys.executable, "-m", "tests.pipeline.preflight_driver", fault]
            command += ["--config", str(self.run_dir.config_path("stage1"))]
            self.processes.append(
                subprocess.Popen(
                    [*command, "--report", str(report)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return report

    def run(self, *faults: str, meet: float = 60.0, **variables: str) -> Outcome:
        """Start, and wait for all that do not hang by order."""
        report = self.start(list(faults), meet, **variables)
        outputs = []
        for process, fault in zip(self.processes, faults, strict=True):
            if fault == "hangs":
                outputs.append(("", ""))
                continue
            outputs.append(process.communicate(timeout=TIMEOUT))
        self.stop()
        codes = [process.wait() for process in self.processes]
        return Outcome(codes, [err for _, err in outputs], outputs[0][0], report)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.stop()


def test_two_good_nodes(world: World) -> None:
    started = time.monotonic()
    outcome = world.run("none", "other_kernel")
    assert outcome.codes == [0, 0], outcome.said
    assert outcome.said == ["", ""]
    assert "preflight passed: 2 nodes, 2 ranks" in outcome.printed
    assert "kernel differs" in outcome.printed  # told, not refused
    first, second = outcome.rank(0), outcome.rank(1)
    assert first["phase"] == second["phase"] == "passed"
    assert (first["node"], second["node"], first["attempt"]) == ("n0", "n1", "7-0-1")
    assert first["bus_gb_per_s"] > 0
    assert set(first["data"]) == set(world.config.data.mix["stage1"])
    assert first["versions"]["torch"] == second["versions"]["torch"]
    assert outcome.bad_nodes == {}
    assert blamed(outcome.report, "7-0-1", ["n0", "n1"]) == {}
    assert time.monotonic() - started < 60
    # The port is free again for the training that follows at once.
    assert not list((world.run_dir.root / "stage1").glob(".preflight*"))


def test_a_rank_that_never_comes(world: World) -> None:
    outcome = world.run("none", "hangs", meet=8.0)
    assert outcome.codes[0] == 1
    assert "n1: its ranks did not come to the rendezvous" in outcome.said[0]
    assert list(outcome.bad_nodes) == ["n1"]
    assert list(blamed(outcome.report, "7-0-1", ["n0", "n1"])) == ["n1"]
    assert blamed(outcome.report, "7-0-2", ["n0", "n1"]) == {}  # another start of the ranks


def test_rank_0_that_never_comes(world: World) -> None:
    outcome = world.run("hangs", "none", meet=2.0)
    assert outcome.codes[1] == 1
    assert outcome.said[1].splitlines()[-1].startswith("error: preflight: n1: rank 0 at 127.0.0.1:")
    assert outcome.rank(1)["phase"] == "versions"


def test_a_broken_device(world: World) -> None:
    outcome = world.run("none", "bad_multiplication")
    assert outcome.codes == [1, 1]
    assert "n1: cpu multiplies wrongly" in outcome.said[0]
    assert outcome.bad_nodes == {"n1": "cpu multiplies wrongly"}
    assert (outcome.rank(1)["phase"], outcome.rank(1)["node_fault"]) == ("started", True)


def test_another_version_and_another_time(world: World) -> None:
    """Three nodes: two of them are the majority in each question."""
    outcome = world.run("none", "other_version", "clock_ahead")
    assert outcome.codes == [1, 1, 1]
    assert "n1: torch is 2.0.0, elsewhere " in outcome.said[0]
    assert "n2: its clock is +60." in outcome.said[0]
    assert set(outcome.bad_nodes) == {"n1", "n2"}
    # Most of the nodes cannot be the exception.
    assert blamed(outcome.report, "7-0-1", ["n0", "n1", "n2"]) == {}


def test_a_wrong_sum(world: World) -> None:
    outcome = world.run("none", "wrong_sum")
    assert outcome.codes == [1, 1]
    assert "an all-reduce of 65536 bytes gave 4.0, not 3.0" in outcome.said[0]
    assert "neighbours: n0-n1 failed" in outcome.said[0]


def test_an_edited_snapshot(world: World) -> None:
    path = world.run_dir.root / "code" / "models" / "anyres.py"
    path.write_text(path.read_text() + "\n# better\n")
    outcome = world.run("none", "none")
    assert outcome.codes == [1, 1]
    assert "models/anyres.py was edited" in outcome.said[0]
    assert outcome.bad_nodes == {}  # it is the same on all


def test_too_little_bandwidth(tmp_path: Path) -> None:
    made = World(tmp_path, "cluster.site.min_bandwidth=1e6")
    try:
        outcome = made.run("none", "none")
    finally:
        made.stop()
    assert outcome.codes == [1, 1]
    assert "cluster.site.min_bandwidth=1e+06; neighbours: n0-n1 " in outcome.said[0]
    assert "failed" not in outcome.said[0]
    assert outcome.bad_nodes == {}


def test_code_from_elsewhere(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that loses PYTHONPATH runs what is installed in it."""
    other = tmp_path / "other"
    shutil.copytree(world.run_dir.root / "code", other)
    monkeypatch.setattr("conf.__file__", str(other / "conf" / "__init__.py"))
    node.snapshot(world.run_dir.root)  # the same code, wherever it is
    (other / "conf" / "compose.py").write_text("# installed long ago\n")
    with pytest.raises(Problem, match=f"runs the code in {other}"):
        node.snapshot(world.run_dir.root)


def test_missing_data(world: World) -> None:
    name = next(iter(world.config.data.mix["stage1"]))
    assert set(node.data(world.config)["data"]) == set(world.config.data.mix["stage1"])
    manifest = Path(world.config.data.root) / name / "index" / "index.json"
    manifest.unlink()
    with pytest.raises(Problem, match=rf"{manifest} cannot be read \(No such file"):
        node.data(world.config)


def test_a_disk_that_cannot_be_written(world: World) -> None:
    """A file where the folder should be: it stops root, too."""
    stage = world.root / "stage1"
    stage.write_text("in the way")
    with pytest.raises(Problem, match=r"stage1 cannot be written \(Not a directory\)"):
        node.disk(world.config, stage, 0)


class Disk:
    """What statvfs would say of another disk."""

    def __init__(self, room: int, files: int) -> None:
        self.f_bavail, self.f_frsize, self.f_favail, self.f_files = room, 1, files, 10**6


def test_room_for_the_checkpoints(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already needs no room again; a full disk and one without inodes are told."""
    stage = world.run_dir.stage("stage1")
    one, wanted = checkpoint_bytes(world.config), world.config.stage.checkpoint.keep + 1
    monkeypatch.setattr("os.statvfs", lambda path: Disk(wanted * one, 10**6))
    assert node.disk(world.config, stage, 0)["disk_need_gb"] > 0
    monkeypatch.setattr("os.statvfs", lambda path: Disk(wanted * one - 1, 10**6))
    with pytest.raises(Problem, match=f"{wanted} checkpoints of .* need .* GB more; make room"):
        node.disk(world.config, stage, 0)
    there = stage / "checkpoints" / "step_00000001"
    there.mkdir(parents=True)
    with (there / "a.distcp").open("wb") as file:
        file.truncate(one)
    node.disk(world.config, stage, 0)
    monkeypatch.setattr("os.statvfs", lambda path: Disk(wanted * one, 3))
    with pytest.raises(Problem, match="3 more files"):
        node.disk(world.config, stage, 0)


def test_the_estimate_of_a_checkpoint(small_run: SmallRun, trained: dict[str, str]) -> None:
    """Indices and headers are most of so small a checkpoint; what a stage adds is not."""
    estimated, written = [], []
    for stage in ("stage1", "stage2"):
        config = small_run.config(stage)
        newest = sorted((small_run.stage_dir(config) / "checkpoints").iterdir())[-1]
        files = [path for path in newest.iterdir() if path.is_file()]
        assert len(files) <= checkpoint_files(config)
        estimated.append(checkpoint_bytes(config))
        written.append(sum(path.stat().st_size for path in files))
        assert estimated[-1] < written[-1]
    more = estimated[1] - estimated[0]
    assert written[1] - written[0] == pytest.approx(more, rel=0.3)


def test_the_number_of_parameters(small_run: SmallRun) -> None:
    model = small_run.config("stage1").model
    assert sum(parameters(model).values()) == 79_824  # as tools.hf_import counts them


def facts(node: str, problem: str | None = None, fault: bool = False, **more: Any) -> Any:
    return {"node": node, "leads": True, "problem": problem, "node_fault": fault, **more}


def test_what_only_some_nodes_find_wrong_is_theirs() -> None:
    four = {rank: facts(f"n{rank}") for rank in range(4)}
    nodes = {rank: f"n{rank}" for rank in range(4)}
    assert judge(four, [], nodes).problems == []
    one = judge({**four, 2: facts("n2", "cannot be written")}, [], nodes)
    assert one.nodes == {"n2": "cannot be written"}
    every = judge({r: facts(f"n{r}", "cannot be written") for r in range(4)}, [], nodes)
    assert every.nodes == {} and len(every.problems) == 4
    lost = judge({r: four[r] for r in (0, 1, 3)}, [2], nodes)
    assert list(lost.nodes) == ["n2"]


def test_data_that_differs_on_one_node() -> None:
    three = {r: facts(f"n{r}", data={"a": "1" if r else "2"}) for r in range(3)}
    verdict = judge(three, [], {})
    assert verdict.nodes == {"n0": "the manifest of data set a is 2, elsewhere 1"}


def test_ranks_that_share_a_gpu() -> None:
    """A node all but one of whose GPUs have failed; and one that shows each rank its own."""
    two = {r: facts(f"n{r // 2}", gpu_uuid=f"G{r if r < 2 else 7}") for r in range(4)}
    assert judge(two, [], {}).nodes == {
        "n1": "ranks [2, 3] share its GPU G7; the others do not show"
    }
    assert judge({r: facts("n0", gpu_uuid="") for r in range(2)}, [], {}).problems == []


def test_clocks() -> None:
    verdict = Verdict()
    judge_clocks(verdict, {"n1": (9.0, 0.1), "n2": (-0.5, 0.1), "n3": (30.0, 26.0)})
    assert list(verdict.nodes) == ["n1"]  # n3's answer took a minute: it says nothing
    most = Verdict()
    judge_clocks(most, {"n1": (9.0, 0.1), "n2": (9.1, 0.1), "n3": (0.0, 0.1)})
    assert most.nodes == {} and len(most.problems) == 2


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_ring_pairs_every_neighbour_once(nodes: int) -> None:
    rounds = ring(nodes)
    pairs = [pair for pairs in rounds for pair in pairs]
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == (nodes if nodes > 2 else 1)
    for each in rounds:
        busy = [place for pair in each for place in pair]
        assert len(busy) == len(set(busy))


def test_the_slow_node_is_the_one_all_of_whose_links_are() -> None:
    links = {(0, 1): 10.0, (1, 2): 2.0, (2, 3): 2.1, (3, 0): 9.0}
    assert slow_places(links, 4) == [2]
    assert slow_places({**links, (1, 2): 10.0}, 4) == []  # one slow link names neither end
    assert slow_places({(0, 1): 10.0, (1, 2): 0.0, (2, 0): 0.0}, 3) == [2]
    assert slow_places({(0, 1): 1.0}, 2) == []
    assert slow_places(dict.fromkeys(links, 0.0), 4) == []  # it is the network


def test_nodes_as_slurm_lays_them_out() -> None:
    step = {"SLURM_STEP_NODELIST": "acc[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert list(planned_nodes(step).values()) == ["acc1", "acc1", "acc2", "acc2", "acc3"]
    assert planned_nodes({}) == {}
    assert planned_nodes({**step, "SLURM_STEP_TASKS_PER_NODE": "many"}) == {}
