"""The local executor against small programs that stand in for training."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import local


def ranks(number: int) -> Config:
    return compose([f"parallel.world_size={number}"])


def run(code: str, segment: Path, number: int = 2) -> None:
    program = [sys.executable, "-c", textwrap.dedent(code)]
    local.run(ranks(number), segment / "config.yaml", segment, program)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_every_rank_gets_its_place_and_no_network(tmp_path: Path) -> None:
    code = """
        import json, os, pathlib, socket
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
        out = pathlib.Path(r"%s") / f"{os.environ['RANK']}.json"
        out.write_text(json.dumps({n: os.environ[n] for n in names}))
        print("rank", os.environ["RANK"])
    """
    run(code % tmp_path, tmp_path, 3)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, values in enumerate(seen):
        assert values["RANK"] == values["LOCAL_RANK"] == str(rank)
        assert values["WORLD_SIZE"] == values["LOCAL_WORLD_SIZE"] == "3"
        assert values["MASTER_ADDR"] == "127.0.0.1"
        assert values["OMP_NUM_THREADS"] == values["HF_HUB_OFFLINE"] == "1"
    assert len({values["MASTER_PORT"] for values in seen}) == 1
    assert (tmp_path / "log.out").read_text() == "rank 0\n"
    assert (tmp_path / "rank_2.out").read_text() == "rank 2\n"


def test_rank_0_speaks_on_the_terminal(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run("import os; print('hello from', os.environ['RANK'])", tmp_path)
    assert capfdbinary.readouterr().out == b"hello from 0\n"


def test_first_failing_rank_is_reported_and_the_others_ended(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, sys, time
        pathlib.Path(r"{tmp_path}", os.environ["RANK"]).write_text(str(os.getpid()))
        if os.environ["RANK"] == "1":
            while not pathlib.Path(r"{tmp_path}", "0").exists():
                time.sleep(0.01)
            print("reading shards")
            sys.exit("error: shard 7 is torn; build it again")
        time.sleep(60)
    """
    began = time.monotonic()
    with pytest.raises(local.JobFailed) as error:
        run(code, tmp_path)
    assert "rank 1 failed with exit code 1" in str(error.value)
    assert "error: shard 7 is torn; build it again" in str(error.value)
    assert str(tmp_path / "rank_1.out") in str(error.value)
    assert error.value.code == 1
    assert time.monotonic() - began < 30
    assert not alive(int((tmp_path / "0").read_text()))


def test_a_rank_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "FAILURE_GRACE_SECONDS", 0.5)
    code = f"""
        import os, pathlib, signal, subprocess, sys, time
        ready = pathlib.Path(r"{tmp_path}", "ready")
        if os.environ["RANK"] == "1":
            while not ready.exists():
                time.sleep(0.01)
            sys.exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(r"{tmp_path}", "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
        ready.touch()
        time.sleep(60)
    """
    with pytest.raises(local.JobFailed, match="rank 1 failed with exit code 3"):
        run(code, tmp_path)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 5)


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    code = "import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(local.JobFailed, match="rank 0 was killed by SIGKILL, perhaps for want"):
        run(code, tmp_path, 1)


def test_a_silent_failure_says_so(tmp_path: Path) -> None:
    with pytest.raises(local.JobFailed, match="it said nothing"):
        run("raise SystemExit(2)", tmp_path, 1)


def test_a_stage_that_stops_on_request_has_not_failed(tmp_path: Path) -> None:
    with pytest.raises(local.JobFailed, match="on request; the same command goes on") as error:
        run("raise SystemExit(143)", tmp_path, 2)
    assert error.value.code == 143


LAUNCHER = """
import sys
from pathlib import Path
from conf.compose import compose
from slurm import local
segment = Path(sys.argv[1])
try:
    local.run(compose(["parallel.world_size=2"]), segment, segment, [sys.executable, sys.argv[2]])
except local.JobFailed as error:
    print(error, file=sys.stderr)
    sys.exit(error.code)
"""

SAVES_ON_REQUEST = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[0]).parent
def stop(number, frame):
    (here / f"saved_{os.environ['RANK']}").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
(here / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_ranks(tmp_path: Path, number: int) -> None:
    (tmp_path / "train.py").write_text(SAVES_ON_REQUEST)
    root = Path(__file__).resolve().parents[2]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), str(tmp_path / "train.py")],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid_files = [tmp_path / "pid_0", tmp_path / "pid_1"]
    assert wait_until(lambda: all(f.exists() and f.read_text() for f in pid_files))
    pids = [int(f.read_text()) for f in pid_files]
    os.kill(launcher.pid, number)
    _, said = launcher.communicate(timeout=30)
    assert wait_until(lambda: not any(alive(pid) for pid in pids), 5)
    if number == signal.SIGKILL:
        return  # the kernel ended the ranks; there was nobody to say so
    assert launcher.returncode == 128 + number
    assert "the same command goes on" in said and said.count("\n") == 1
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


def test_a_machine_without_gpus_refuses_a_crowd() -> None:
    with pytest.raises(ConfigError, match="too many for this machine"):
        local.refuse_too_many(ranks(4096))
    local.refuse_too_many(ranks(8))
    local.refuse_too_many(compose(["parallel.world_size=64", "cluster.gpus_per_node=64"]))


def test_last_line_of_odd_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\nstep 1\rstep 2\r\n  \xff end \n\n")
    assert local.last_line(log) == "\ufffd end"
    assert "cannot be read" in local.last_line(tmp_path / "none")


def test_the_port_is_none_that_a_connection_may_get() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {local.free_port() for _ in range(20)}
    assert all(1024 < port < lowest for port in ports) and len(ports) > 1
