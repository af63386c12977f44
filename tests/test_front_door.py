"""The Makefile: every verb it lists runs something that exists, and is quick when all is ready."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VERBS = re.findall(r"^([a-z0-9 -]+):.*## ", MAKEFILE, flags=re.MULTILINE)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A finished environment as far as make can tell: this interpreter, and a fresh stamp."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    return tmp_path


def make(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MODULES = re.findall(r"(?:\$\(PY\) -m |\$\(call slurm,\w+,)([a-z][\w.]+)", MAKEFILE)


@pytest.mark.parametrize("module", sorted({*MODULES, "slurm.remote"}))
def test_every_module_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_help_lists_every_verb() -> None:
    listed = make("help")
    assert len(VERBS) > 10
    for verb in VERBS:
        assert f"  {verb} " in listed


def test_ready_means_nothing_is_installed(venv: Path) -> None:
    assert "pip" not in make("-n", "setup", f"VENV={venv}")
    (venv / ".installed").unlink()
    assert "pip" in make("-n", "setup", f"VENV={venv}")


def test_variables_reach_the_launcher(venv: Path) -> None:
    line = make(
        "-n", "stage2", f"VENV={venv}", "RUN=mine", "MODEL=m", "DATA=d", "DRY=1", "ARGS=a=b"
    )
    for word in ("run=mine", "model=m", "data=d", "cluster=local", "dry=1", "'stages=[stage2]'"):
        assert word in line.split()
    assert line.rstrip().endswith("a=b")


def test_a_remote_host_gets_the_same_words(venv: Path) -> None:
    words = ["-n", "pipeline", f"VENV_REMOTE={venv}", "CLUSTER=mn5", "DRY=1", "ARGS=a=b"]
    line = make(*words, "REMOTE=me@there", "REMOTE_DIR=~/x")
    before, verb, after = line.partition("verb=submit")
    assert verb and "'host=me@there' 'dir=~/x'" in before
    local = make("-n", "pipeline", f"VENV={venv}", "CLUSTER=mn5", "DRY=1", "ARGS=a=b")
    assert after.split() == local.partition("slurm.submit")[2].split()


def test_a_prepared_environment_is_left_alone(tmp_path: Path) -> None:
    line = make("-n", "status", f"VENV={tmp_path}", "PREPARED=1")
    assert "pip" not in line and f"{tmp_path}/bin/python -m slurm.status" in line


@pytest.mark.parametrize("verb", ["demo", "shards", "import", "export", "eval", "report"])
def test_what_runs_here_only_refuses_a_remote_host(venv: Path, verb: str) -> None:
    words = ["make", "-C", str(ROOT), "-n", verb, f"VENV={venv}", "REMOTE=me@there"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode and f"make {verb}" in done.stderr


def test_a_site_gets_the_real_model_and_everybody_else_the_demo(venv: Path) -> None:
    for cluster, words in {
        "local": ("run=demo", "model=tiny", "data=demo"),
        "slurm": ("run=demo", "model=tiny", "data=demo"),
        "mn5": ("run=amalia", "model=amalia_vl_9b", "data=amalia"),
    }.items():
        line = make("-n", "pipeline", f"VENV={venv}", f"CLUSTER={cluster}").split()
        assert {*words, f"cluster={cluster}", "export=true"} <= set(line)
        assert not [word for word in line if word.startswith(("dry=", "test_only=", "yes="))]
    line = make("-n", "pipeline", f"VENV={venv}", "CLUSTER=mn5", "TEST_ONLY=1", "YES=1", "MODEL=m")
    assert {"test_only=1", "yes=1", "model=m", "run=amalia"} <= set(line.split())
    assert "export=true" not in make("-n", "stage1", f"VENV={venv}", "CLUSTER=mn5").split()
