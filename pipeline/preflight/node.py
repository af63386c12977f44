"""What each node answers for by itself: device, disk, code, data, versions."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import conf
from conf.schema import Config
from conf.snapshot import CODE, PLAN, code_digest, difference
from pipeline.preflight.checkpoint_size import checkpoint_bytes, checkpoint_files
from pipeline.preflight.report import Problem

GIGA = 1e9
_MEMORY_SHARE = 0.9  # of the promised GPU memory must be there
_MATMUL = 512
_CHUNK = 1 << 22  # bytes
_PACKAGES = ("torch", "megatron-core", "transformer-engine")


def device(config: Config, local_rank: int) -> dict[str, Any]:
    """The rank's device exists, has its memory, and multiplies correctly."""
    if not torch.cuda.is_available():
        if config.cluster.gpus_per_node and torch.version.cuda is None:
            raise Problem(
                f"torch {torch.__version__} is built without CUDA; install the CUDA build, or set "
                "cluster.gpus_per_node=0"
            )
        if config.cluster.gpus_per_node:
            raise Problem("no GPU that torch can use; look at nvidia-smi there", node_fault=True)
        _multiply(torch.device("cpu"))
        return {"device": "cpu", "cpus": len(os.sched_getaffinity(0))}
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise Problem(f"rank {local_rank} of the node finds only {count} GPUs", node_fault=True)
    # Some sites show each rank its own GPU only; that no two share one is seen at the rendezvous.
    gpu = local_rank % count
    try:
        torch.cuda.set_device(gpu)
        properties = torch.cuda.get_device_properties(gpu)
        free, total = torch.cuda.mem_get_info(gpu)
        promised = config.cluster.gpu_memory_gb
        if promised is not None and total < _MEMORY_SHARE * promised * GIGA:
            raise Problem(
                f"GPU {gpu} has {total / GIGA:.1f} GB, cluster.gpu_memory_gb={promised}",
                node_fault=True,
            )
        _multiply(torch.device("cuda", gpu))
    except RuntimeError as error:  # CUDA's errors, out of memory among them
        line = str(error).strip().splitlines()[0]
        raise Problem(f"GPU {gpu} does not work ({line})", node_fault=True) from error
    return {
        "device": properties.name,
        "gpu_uuid": str(getattr(properties, "uuid", "")),
        "gpu_gb": round(total / GIGA, 1),
        "gpu_free_gb": round(free / GIGA, 1),
        "gpus_visible": count,
    }


def _multiply(where: torch.device) -> None:
    """Small whole numbers, so that every precision gives the exact product."""
    rows = torch.arange(_MATMUL).view(-1, 1)
    left = ((rows * 3 + rows.T * 5) % 7).float()
    right = ((rows * 2 + rows.T * 11) % 5).float()
    expected = (left.long() @ right.long()).float()
    product = (left.to(where) @ right.to(where)).cpu()
    if not torch.equal(product, expected):
        raise Problem(f"{where} multiplies wrongly", node_fault=True)


def disk(config: Config, stage_dir: Path, rank: int) -> dict[str, Any]:
    """The stage directory can be written and has room for the checkpoints to come."""
    probe = stage_dir / f".preflight_{rank}"
    try:
        with probe.open("wb") as file:
            file.write(b"preflight")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
        state = os.statvfs(stage_dir)
    except OSError as error:
        raise Problem(f"{stage_dir} cannot be written ({error.strerror})") from error
    room, files = state.f_bavail * state.f_frsize, state.f_favail
    wanted = config.stage.checkpoint.keep + 1  # an old one goes when the new one is there
    there = [path.stat() for path in (stage_dir / "checkpoints").glob("*/*") if path.is_file()]
    one = checkpoint_bytes(config)
    need = max(0, wanted * one - sum(entry.st_size for entry in there))
    if room < need:
        raise Problem(
            f"{stage_dir} has {room / GIGA:.1f} GB left, {wanted} checkpoints of "
            f"{one / GIGA:.1f} GB need {need / GIGA:.1f} GB more; make room, or lower "
            "stage.checkpoint.keep"
        )
    need_files = max(0, wanted * checkpoint_files(config) - len(there))
    if state.f_files and files < need_files:  # some file systems count none
        raise Problem(
            f"{stage_dir} has room for {files} more files (inodes), the checkpoints need "
            f"{need_files}; remove files"
        )
    return {"disk_free_gb": round(room / GIGA, 3), "disk_need_gb": round(need / GIGA, 3)}


def snapshot(run_dir: Path) -> dict[str, Any]:
    """The run's code is as submitted, and is what this process runs."""
    reason = difference(run_dir)
    if reason is not None:
        raise Problem(reason)
    running = Path(conf.__file__).resolve().parent.parent
    recorded = json.loads((run_dir / PLAN).read_text(encoding="utf-8"))["code"]
    if running != (run_dir / CODE).resolve() and code_digest(running) != recorded:
        raise Problem(
            f"this job runs the code in {running}, not the run's {run_dir / CODE}; does the "
            "container keep PYTHONPATH?"
        )
    return {"code": recorded}


def data(config: Config) -> dict[str, Any]:
    """SHA-256 of the manifest's index of each data set in the stage's mixture, which holds those
    of all its columns."""
    found = {}
    for name in config.data.drawn(config.stage.name):
        path = Path(config.data.root) / name / "index" / "index.json"
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise Problem(f"{path} cannot be read ({error.strerror})") from error
        found[name] = digest.hexdigest()
    return {"data": found}


def versions() -> dict[str, str]:
    """Of what must be the same on all nodes; "none" where something is not there."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["driver"] = "none"
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        number = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
        found["driver"] = number[0] if number else "unknown"
    except OSError:
        pass
    return found
