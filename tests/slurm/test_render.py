"""Batch scripts: what stands in them, and what their shell lines do (with srun played by bash)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import bodies
from slurm.job import Job
from slurm.render import comment, rank_command, script, single_command

MN5 = ["cluster=mn5", "cluster.account=ehpc01", "cluster.qos=acc_ehpc", "parallel=h100_8"]
MN5 += ["model=amalia_vl_9b", "data=amalia"]


def job(directory: Path, **changes: object) -> Job:
    plain = Job("r.stage1.001", "segment", directory, "echo hello", 12.0, stage="stage1", number=1)
    return replace(plain, **changes)  # type: ignore[arg-type]


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines as a dictionary."""
    words = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(word[2:].partition("=")[::2] for word in words)


def test_what_every_job_asks_for() -> None:
    config = compose(MN5)
    changes = {"nodes": 2, "ranks_per_node": 4, "gpus_per_node": 4, "cpus_per_rank": 20}
    text = script(
        job(Path("/p/runs/r/stage1/segments/001"), exclusive=True, signal_seconds=600, **changes),
        config,
        Path("/p/runs/r/code"),
        "afterany:12,afterok:9",
        ["as01", "as02"],
        Path("/p"),
    )
    assert text.startswith("#!/bin/bash -l\n")  # modules, on this site
    given = options(text)
    assert given == {
        "account": "ehpc01",
        "qos": "acc_ehpc",
        "job-name": "r.stage1.001",
        "comment": "amalia-vl:/p/runs/r",
        "chdir": "/p",
        "output": "/p/runs/r/stage1/segments/001/log.out",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "20",
        "gres": "gpu:4",
        "exclusive": "",
        "exclude": "as01,as02",
        "time": "720",
        "signal": "USR2@600",
        "requeue": "",
        "kill-on-invalid-dep": "yes",
        "dependency": "afterany:12,afterok:9",
        **config.cluster.site.sbatch,
    }
    for name in ("mem", "wckey", "error", "array"):
        assert name not in given
    assert "=False" not in text and "=None" not in text
    lines = text.splitlines()
    assert "export PYTHONPATH=/p/runs/r/code" in lines and "export PYTHONSAFEPATH=1" in lines
    assert "export HF_HUB_OFFLINE=1" in lines and "export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines
    assert "export NCCL_NET=IB" in lines
    assert lines[-1] == "echo hello"


def test_what_differs_between_sites() -> None:
    plain = compose(["cluster=slurm", "cluster.site.gpu_flag=gpus-per-node"])
    text = script(job(Path("/r/x"), gpus_per_node=2), plain, Path("/r/code"))
    given = options(text)
    assert text.startswith("#!/bin/bash\n")
    assert given["gpus-per-node"] == "2" and "gres" not in given
    assert not {"account", "qos", "partition", "mem", "dependency", "exclude"} & set(given)
    assert options(script(job(Path("/r/x"), exclusive=True), plain, Path("/r/code")))["mem"] == "0"
    words = ["cluster=slurm", "cluster.memory_gb=100", "cluster.cpus_per_node=10"]
    words += ["cluster.partition=p", "cluster.reservation=course", "cluster.site.gpu_flag=none"]
    some = compose(words)
    given = options(script(job(Path("/r/x"), cpus_per_rank=2, gpus_per_node=1), some, Path("/r/c")))
    assert given["mem"] == "20G" and given["partition"] == "p"
    assert given["reservation"] == "course" and "gres" not in given


def test_an_array_is_throttled_and_logs_by_element() -> None:
    array = job(Path("/r/arrays/shards/001"), kind="array", elements=300, throttle=8)
    given = options(script(array, compose(["cluster=slurm"]), Path("/r/code")))
    assert given["array"] == "0-299%8"
    assert given["output"] == "/r/arrays/shards/001/log_%a.out"
    given = options(script(replace(array, throttle=None), compose(["cluster=slurm"]), Path("/c/c")))
    assert given["array"] == "0-299%300"


def test_the_ranks_are_started_by_an_explicit_srun() -> None:
    line = rank_command(compose(MN5), ["pipeline.train", "--config", "/a b/config.yaml"])
    words = shlex.split(line.replace("\\\n", " "))
    for word in (
        *("srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=20"),
        *("--kill-on-bad-exit=1", "--unbuffered", "--label", "--cpu-bind=none"),
    ):
        assert word in words
    assert words[-5:] == [sys.executable, "-m", "pipeline.train", "--config", "/a b/config.yaml"]
    uneven = rank_command(compose(["cluster=mn5", "parallel.world_size=5"]), ["x"])
    assert "--ntasks=5" in uneven and "--ntasks-per-node" not in uneven  # Slurm would warn
    contained = compose(
        ["cluster=slurm", "cluster.python=python3", "cluster.site.container=podman exec $IMAGE"]
    )
    assert single_command(contained, ["m", "a b"]) == "podman exec $IMAGE python3 -m m 'a b'"
    assert rank_command(contained, ["m"]).endswith(" podman exec $IMAGE python3 -m m")


@pytest.mark.parametrize("odd", ["a b", "it's", 'q"q', "$(touch harm)", "`touch harm`", "50%j"])
def test_odd_paths_stay_paths(tmp_path: Path, odd: str) -> None:
    run = tmp_path / odd / "r"
    stage, segment = run / "stage1", run / "stage1" / "segments" / "001"
    config = compose(["cluster=slurm", "parallel=dp2"])
    body = bodies.segment(config, stage / "config.yaml", stage, segment)
    text = script(job(segment, body=body), config, run / "code", directory=tmp_path / odd)
    given = options(text)
    assert given["chdir"] == str(tmp_path / odd) and given["comment"] == comment(run)
    assert given["output"] == f"{segment}/log.out".replace("%", "%%")
    assert f"export PYTHONPATH={shlex.quote(str(run / 'code'))}" in text.splitlines()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    export = bodies.export(config, stage, run / "hf")
    run.mkdir(parents=True)
    (run / "hf").mkdir()
    said = subprocess.run(["bash", "-c", export], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout == f"{run / 'hf'} is there already\n" and said.returncode == 0
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("where", ["directory", "account"])
def test_a_line_break_cannot_become_a_line_of_the_script(where: str) -> None:
    config = compose(["cluster=slurm"])
    directory = Path("/r/x")
    if where == "account":
        config.cluster.account = "a\n#SBATCH --uid=root"
    else:
        directory = Path("/r/x\ntouch harm")
    with pytest.raises(ConfigError, match="line break"):
        script(job(directory), config, Path("/r/code"))


SRUN = """#!/bin/bash
# One task: what follows the options is run as Slurm would on the first node.
while [ "${1:0:2}" = -- ]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_TASKS_PER_NODE='1(x2)'
exec "$@"
"""
# Stands in for python: notes its module, arguments and environment; its exit codes come from files.
PYTHON = """#!/bin/bash
here=HERE
what=$2; [ "$what" = slurm.segment ] && what=$3
echo "$what ${*:4}" >> "$here/calls"
env > "$here/env_$what"
if [ "$what" = pipeline.train ] && [ -e "$here/slow" ]; then
  trap 'exit 143' TERM USR2
  touch "$here/running"; for _ in $(seq 200); do sleep 0.05; done
fi
code=$(sed -n 1p "$here/code_$what" 2>/dev/null); sed -i 1d "$here/code_$what" 2>/dev/null
exit "${code:-0}"
"""


class Script:
    """A segment's script, run by bash on this machine with srun and python played."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        (root / "bin").mkdir()
        for name, text in {"srun": SRUN, "python": PYTHON.replace("HERE", str(root))}.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        words = ["cluster=slurm", "parallel=dp2", f"cluster.python={root}/bin/python"]
        config: Config = compose([*words, *overrides])
        stage, segment = root / "r" / "stage1", root / "r" / "stage1" / "segments" / "001"
        body = bodies.segment(config, stage / "config.yaml", stage, segment)
        self.path = root / "submit.sh"
        self.path.write_text(script(job(segment, body=body), config, root / "r" / "code"))

        stage.mkdir(parents=True)
        self.done = stage / "DONE.json"
        self.done.touch()

    def codes(self, what: str, *codes: int) -> None:
        (self.root / f"code_{what}").write_text("".join(f"{code}\n" for code in codes))

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        environment = {
            **os.environ,
            "PATH": f"{self.root}/bin{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "4321",
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(self.path)], env=environment, text=True, start_new_session=True
        )

    def run(self, **variables: str) -> int:
        return self.start(**variables).wait(timeout=30)

    def calls(self) -> list[str]:
        return [line.split()[0] for line in (self.root / "calls").read_text().splitlines()]

    def environment(self, what: str) -> dict[str, str]:
        lines = (self.root / f"env_{what}").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines if "=" in line)


def test_a_segment_begins_looks_trains_and_ends(tmp_path: Path) -> None:
    segment = Script(tmp_path, "cluster.hours=2", "cluster.stop_minutes=10")
    assert segment.run() == 0
    assert segment.calls() == ["begin", "pipeline.preflight", "pipeline.train", "end"]
    rank = segment.environment("pipeline.train")
    assert (rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) == ("0", "0", "2")
    assert rank["LOCAL_WORLD_SIZE"] == "1"
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", rank["MASTER_ADDR"])
    assert 15000 <= int(rank["MASTER_PORT"]) < 30000
    assert 6500 < int(rank["STOP_AFTER_SECONDS"]) <= 6600
    assert rank["PYTHONPATH"] == str(tmp_path / "r" / "code")
    assert rank["ATTEMPT_ID"] == segment.environment("end")["ATTEMPT_ID"]
    assert "--code 0" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_the_end_of_the_job_is_slurms_where_it_says(tmp_path: Path) -> None:
    segment = Script(tmp_path, "cluster.hours=2", "cluster.stop_minutes=10")
    assert segment.run(SLURM_JOB_END_TIME=str(int(time.time()) + 3600)) == 0
    assert 2900 < int(segment.environment("pipeline.train")["STOP_AFTER_SECONDS"]) <= 3000
    # A clock that is wrong by a day must not stop the ranks at once, nor never.
    for shift in (-86400, 86400):
        assert segment.run(SLURM_JOB_END_TIME=str(int(time.time()) + shift)) == 0
        seconds = int(segment.environment("pipeline.train")["STOP_AFTER_SECONDS"])
        assert 6500 < seconds <= 6600


@pytest.mark.parametrize(("begin", "code"), [(3, 0), (1, 1), (9, 9)])
def test_a_segment_that_may_not_or_need_not_begin(tmp_path: Path, begin: int, code: int) -> None:
    segment = Script(tmp_path)
    segment.codes("begin", begin)
    assert segment.run() == code
    assert segment.calls() == ["begin"]


def test_exit_codes_are_kept_and_the_ranks_started_again(tmp_path: Path) -> None:
    segment = Script(tmp_path)
    segment.codes("pipeline.train", 7, 9)
    segment.codes("end", 75, 9)
    assert segment.run() == 9
    assert segment.calls() == ["begin", "pipeline.preflight", "pipeline.train", "end"] * 2
    ends = [line for line in (tmp_path / "calls").read_text().splitlines() if line[:4] == "end "]
    assert ["--code 7" in ends[0], "--code 9" in ends[1]] == [True, True]


def test_each_start_of_the_ranks_has_a_name_and_a_port_of_its_own(tmp_path: Path) -> None:
    segment = Script(tmp_path)
    segment.codes("end", 75)
    seen = []
    original = (tmp_path / "bin" / "python").read_text()
    noting = original.replace("exit", 'env >> "$here/every"; exit', 1)
    (tmp_path / "bin" / "python").write_text(noting.replace('env > "$here', 'env >> "$here'))
    assert segment.run() == 0
    text = (tmp_path / "env_pipeline.train").read_text()
    for name in ("ATTEMPT_ID", "MASTER_PORT"):
        seen.append(re.findall(rf"^{name}=(.*)$", text, re.MULTILINE))
    assert all(len(values) == len(set(values)) == 2 for values in seen)
    ports = [int(port) for port in seen[1]]
    assert ports[0] // 10 == ports[1] // 10  # neighbouring jobs never meet


@pytest.mark.parametrize("ends", [130, 138, 140, 143])
def test_ranks_that_stop_on_request_have_not_failed(tmp_path: Path, ends: int) -> None:
    segment = Script(tmp_path)
    segment.done.unlink()
    segment.codes("pipeline.train", ends)
    assert segment.run() == 0
    assert "--code 143" in (tmp_path / "calls").read_text().splitlines()[-1]
    segment.codes("pipeline.train", 137)  # killed: that is a failure
    segment.run()
    assert "--code 137" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_failed_preflight_keeps_the_ranks_from_starting(tmp_path: Path) -> None:
    segment = Script(tmp_path)
    segment.codes("pipeline.preflight", 5)
    segment.codes("end", 5)
    assert segment.run() == 5
    assert segment.calls() == ["begin", "pipeline.preflight", "end"]
    assert "--code 5" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_without_preflight(tmp_path: Path) -> None:
    segment = Script(tmp_path, "cluster.preflight=false")
    assert segment.run() == 0
    assert segment.calls() == ["begin", "pipeline.train", "end"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_shell_that_is_asked_to_end_says_so(tmp_path: Path, number: int) -> None:
    segment = Script(tmp_path)
    (tmp_path / "slow").touch()
    segment.done.unlink()
    segment.codes("end", 0)
    process = segment.start()
    end = time.monotonic() + 20
    while not (tmp_path / "running").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert process.wait(timeout=20) == 0
    assert segment.calls() == ["begin", "pipeline.preflight", "pipeline.train", "end"]
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith("--code 143 --terminated")
