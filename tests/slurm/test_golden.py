"""Scripts of every profile: as recorded, by the site's rules, and as a real Slurm takes them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conf.compose import compose
from tests.slurm.golden import CLUSTERS, DIRECTORY, ITEMS, THROTTLE, recorded, written
from tests.slurm.throwaway import ThrowAwaySlurm

FILES = sorted(path.name for path in DIRECTORY.glob("*.sh"))
SEGMENTS = [name for name in FILES if "_stage" in name]
CORES_OF_A_RANK = {"mn5": 20, "deucalion": 32, "leonardo": 8, "jupiter": 72, "slurm": 8}
GPU_SITES = [name for name in CLUSTERS if name != "slurm"]


def text_of(name: str) -> str:
    return (DIRECTORY / name).read_text(encoding="utf-8")


def options_of(text: str) -> dict[str, str]:
    """Options of the #SBATCH lines."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(found) == len(re.findall(r"^#SBATCH", text, re.MULTILINE))
    assert len(found) == len(dict(found)), "an option is given twice"
    return dict(found)


def sruns_of(text: str) -> list[str]:
    return re.findall(r"^\s*srun (.*?)\\$", text, re.MULTILINE)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_scripts_are_as_recorded(cluster: str, tmp_path: Path) -> None:
    """After a wanted change: `python -m tests.slurm.golden`, and read the difference."""
    now = written(cluster, tmp_path.resolve())
    before = recorded(cluster)
    assert sorted(now) == sorted(before)
    for name, text in now.items():
        assert text == before[name], f"{name}: python -m tests.slurm.golden, if this is wanted"


@pytest.mark.parametrize("name", FILES)
def test_every_script(name: str) -> None:
    text, cluster = text_of(name), name.split("_")[0]
    options = options_of(text)
    assert text.startswith("#!/bin/bash")
    assert "wckey" not in text
    assert options["kill-on-invalid-dep"] == "yes"
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["comment"] == "amalia-vl:/project/runs/first"
    assert int(options["nodes"]) >= 1 and int(options["cpus-per-task"]) >= 1
    config = compose([f"cluster={cluster}", "stage=stage2", *CLUSTERS[cluster]])
    assert config.cluster.queue is None or int(options["time"]) <= config.cluster.queue.hours * 60
    # Offline, and running the snapshot, not what the working tree has become.
    for line in (
        "export PYTHONPATH=/project/runs/first/code",
        "export PYTHONSAFEPATH=1",
        "export HF_HUB_OFFLINE=1",
        "export TRANSFORMERS_OFFLINE=1",
    ):
        assert f"\n{line}\n" in text
    # Slurm's own, not the batch shell's: ranks save when they get it.
    assert re.fullmatch(r"USR2@\d+", options["signal"])
    # No secrets, no machine of ours.
    assert not re.search(r"/root|/home|/tmp|_TOKEN|PASSWORD", text)


@pytest.mark.parametrize("name", FILES)
def test_bash_can_read_it(name: str) -> None:
    checked = subprocess.run(
        ["bash", "-n", str(DIRECTORY / name)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", SEGMENTS)
def test_every_segment(name: str) -> None:
    text, cluster = text_of(name), name.split("_")[0]
    options = options_of(text)
    nodes, ranks = int(options["nodes"]), int(options["ntasks-per-node"])
    assert "exclusive" in options
    assert int(options["cpus-per-task"]) == CORES_OF_A_RANK[cluster]
    sruns = sruns_of(text)
    assert len(sruns) == 2  # preflight, training
    for srun in sruns:
        words = srun.split()
        assert f"--nodes={nodes}" in words and f"--ntasks={nodes * ranks}" in words
        assert f"--ntasks-per-node={ranks}" in words
        # Not inherited from the job by every version of Slurm.
        assert f"--cpus-per-task={CORES_OF_A_RANK[cluster]}" in words
        assert "--kill-on-bad-exit=1" in words
    assert "MASTER_PORT=$((" in text and "SLURM_JOB_ID" in text
    assert "getent ahostsv4" in text  # a number, not a name
    # The exit code of the ranks is the job's: nothing comes after it.
    assert text.rstrip().endswith('if [ "$code" -ne 75 ]; then exit "$code"; fi\ndone')
    # Saves long enough before the end, by the timer and by the signal.
    assert int(options["signal"].split("@")[1]) == 600
    for word in ("RANK=$SLURM_PROCID", "LOCAL_RANK=$SLURM_LOCALID", "WORLD_SIZE=$SLURM_NTASKS"):
        assert word in text


@pytest.mark.parametrize("cluster", GPU_SITES)
def test_every_site_with_gpus(cluster: str) -> None:
    for name, text in recorded(cluster).items():
        options = options_of(text)
        assert options["account"] == "project42"
        if name in SEGMENTS:
            assert options["gres"] == "gpu:4" and options["ntasks-per-node"] == "4"
            assert all("--gpu-bind=none" in words for words in sruns_of(text))
            assert all("--cpu-bind=none" in words for words in sruns_of(text))
            assert "export CUDA_DEVICE_MAX_CONNECTIONS=1" in text
    stage1, stage2 = (options_of(text_of(f"{cluster}_stage{n}.sh")) for n in (1, 2))
    assert stage1["nodes"] == "2"
    assert stage2["nodes"] == ("4" if cluster == "deucalion" else "16")


def test_mn5() -> None:
    for name, text in recorded("mn5").items():
        options = options_of(text)
        assert not [key for key in options if key.startswith("mem")], "mn5 refuses it"
        assert options["qos"] == "acc_ehpc" and "partition" not in options
        gpus = 4 if name in (*SEGMENTS, "mn5_export.sh") else 1
        assert options["gres"] == f"gpu:{gpus}"
        # 20 cores come with each GPU, and other proportions wait for ever.
        assert int(options["cpus-per-task"]) * int(options["ntasks-per-node"]) == 20 * gpus
        assert "NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5" in text
        assert text.startswith("#!/bin/bash -l\n")
        assert int(options["time"]) <= 720  # short ones start sooner


def test_deucalion() -> None:
    for text in recorded("deucalion").values():
        options = options_of(text)
        assert text.startswith("#!/bin/bash -l\n"), "module load does nothing without it"
        assert "module purge" not in text, "loses MODULEPATH"
        assert options["mem"] == ("0" if "exclusive" in options else "121G")
        assert options["partition"] == "normal-a100-80" and "qos" not in options
        assert int(options["nodes"]) <= 4 and int(options["time"]) <= 48 * 60


def test_leonardo() -> None:
    for text in recorded("leonardo").values():
        options = options_of(text)
        assert options["partition"] == "boost_usr_prod" and "qos" not in options
        assert int(options["nodes"]) <= 64 and int(options["time"]) <= 24 * 60
        assert (options["mem"] == "0") == ("exclusive" in options)
        assert ("gres" in options) == ("exclusive" in options)


def test_jupiter() -> None:
    for name, text in recorded("jupiter").items():
        options = options_of(text)
        assert options["partition"] == "booster" and "mem" not in options
        assert int(options["time"]) <= 12 * 60
        if name in SEGMENTS:
            assert "dev ib0" in text, "names resolve to loopback"
            assert all("--mpi=none" in words for words in sruns_of(text))


def test_any_slurm_without_gpus() -> None:
    for name, text in recorded("slurm").items():
        options = options_of(text)
        assert not {"account", "qos", "partition", "gres", "gpus-per-node"} & set(options)
        if name in SEGMENTS:
            assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1")


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_arrays_are_throttled(cluster: str) -> None:
    text = text_of(f"{cluster}_array.sh")
    assert options_of(text)["array"] == f"0-{ITEMS - 1}%{THROTTLE}"
    assert "log_%a.out" in options_of(text)["output"]
    assert "exclusive" not in options_of(text)


ON_REAL = {"mn5_stage1.sh": "acc", "slurm_stage2.sh": "cpu", "slurm_verify.sh": "cpu"}


@pytest.mark.slurm
@pytest.mark.parametrize("name", [*ON_REAL, "slurm_array.sh"])
def test_a_real_slurm_takes_it(name: str, slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    """Every option is one that Slurm knows, on nodes of that shape."""
    place = ON_REAL.get(name, "cpu")
    shutil.copy(DIRECTORY / name, tmp_path)
    said = slurm.run("sbatch", "--test-only", f"--partition={place}", str(tmp_path / name))
    assert f"in partition {place}" in said.stderr
    bad = tmp_path / "bad.sh"
    bad.write_text(text_of(name).replace("#SBATCH --requeue", "#SBATCH --reque=3"))
    refused = slurm.run("sbatch", "--test-only", f"--partition={place}", str(bad), check=False)
    assert refused.returncode != 0


@pytest.mark.slurm
@pytest.mark.parametrize("cluster", GPU_SITES)
def test_each_rank_sees_all_gpus_of_its_node(cluster: str, slurm: ThrowAwaySlurm) -> None:
    """The words that a site adds to srun, on two nodes of four stand-ins for GPUs."""
    words = compose([f"cluster={cluster}"]).cluster.site.srun
    asked = ["--partition=acc", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4"]
    # Slurm leaves the variable out, or names all four: CUDA then shows what the node has.
    show = 'echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS ${CUDA_VISIBLE_DEVICES-0,1,2,3}"'

    def rows(*srun: str) -> list[list[str]]:
        done = slurm.run("srun", *asked, "--cpus-per-task=8", *srun, "sh", "-c", show)
        return sorted(line.split() for line in done.stdout.splitlines())

    assert rows(*words) == [[str(n), str(n % 4), "8", "0,1,2,3"] for n in range(8)]
    others = [word for word in words if not word.startswith("--gpu-bind")]
    assert {row[3] for row in rows(*others, "--gpu-bind=single:1")} == {"0", "1", "2", "3"}
