"""All that one GPU can check, in one call of less than nine minutes, the tables printed last:

    python -m tools.benchmarks.gpu out=DIR [parts=smoke,speed,parity,curve,resume] [layers=12]
        [batches=runs/bench/demo_batches.npz] [seconds=530] [device=cuda|cpu] [shape=real|tiny]

`device=cpu shape=tiny` tries the script itself, with Megatron's local layers, in FP32 and BF16.
The parts run in one child process. A part that takes too long is killed, and where the GPU is lost
a new child goes on with the next; what was measured before stays in DIR/PART.json. The end
of it all is DIR/tables.md and DIR/results.json; warnings and tracebacks go to DIR/stderr.log.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_shards.durable import replacing
from tools.benchmarks import machine
from tools.benchmarks.gpu.child import PARTS
from tools.benchmarks.gpu.report import (
    FAILED,
    LATE,
    RUNNING,
    SKIPPED,
    Report,
    as_text,
    read_report,
)
from tools.command import run, split_arguments

NAMES = ("out", "parts", "layers", "batches", "seconds", "device", "shape")
USAGE = f"python -m tools.benchmarks.gpu out=DIR [parts={','.join(PARTS)}] ..."
# Seconds that a part may take; the first also pays for the imports.
BUDGETS = {"smoke": 80, "speed": 190, "parity": 70, "curve": 170, "resume": 70}
POLL = 0.1


def child_environment(device: str) -> dict[str, str]:
    """Libraries of the pip packages of CUDA on the path; no GPU where none is wanted."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
        return environment
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    found = [str(packages / name / "lib") for name in ("cu13", "cudnn", "nccl")]
    # Rows of several lengths in one process: fewer gaps that nothing fits into.
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    known = environment.get("LD_LIBRARY_PATH")
    environment["LD_LIBRARY_PATH"] = ":".join([*found, *([known] if known else [])])
    return environment


def _running(out: Path, parts: Sequence[str]) -> tuple[str, Report]:
    """The last part that has begun."""
    begun = [part for part in parts if (out / f"{part}.json").is_file()]
    part = begun[-1] if begun else parts[0]
    return part, read_report(out / f"{part}.json", part)


def run_child(
    out: Path, parts: Sequence[str], words: Sequence[str], end: float, device: str
) -> int:
    """Run `parts` in one process; returns how many of them have had their turn."""
    budgets = {part: BUDGETS[part] for part in parts}
    command = [sys.executable, "-m", "tools.benchmarks.gpu.child", f"parts={','.join(parts)}"]
    command += [f"out={out}", f"budgets={json.dumps(budgets)}", f"end={end}", *words]
    with open(out / "stderr.log", "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            env=child_environment(device),
            cwd=machine.REPOSITORY,
            stderr=errors,
            start_new_session=True,
        )
    current, since, killed = parts[0], time.monotonic(), False
    try:
        while process.poll() is None:
            time.sleep(POLL)
            part, _ = _running(out, parts)
            if part != current:
                current, since = part, time.monotonic()
            late = time.monotonic() - since > BUDGETS[current] or time.monotonic() > end
            if late and not killed:
                killed = True
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    current, report = _running(out, parts)
    if killed or report.status == RUNNING:
        report.status = LATE if killed else FAILED
        report.seconds = time.monotonic() - since
        if not killed:
            last = (out / "stderr.log").read_text(encoding="utf-8").strip().splitlines()[-1:]
            report.error = f"the process ended with status {process.returncode}: {''.join(last)}"
        report.path = out / f"{current}.json"
        report.write()
    return parts.index(current) + 1


def run_parts(
    out: Path, parts: Sequence[str], words: Sequence[str], end: float, device: str
) -> None:
    """All parts, with as many processes as it takes."""
    for name in (*(f"{part}.json" for part in parts), "stderr.log"):
        (out / name).unlink(missing_ok=True)
    left = list(parts)
    while left and time.monotonic() < end:
        left = left[run_child(out, left, words, end, device) :]
    for part in left:
        Report(part, out / f"{part}.json", status=SKIPPED, error="no time was left").write()


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    given, unknown = split_arguments(arguments, NAMES)
    if unknown or "out" not in given:
        wrong = f"unknown argument {unknown[0]!r}" if unknown else "out= is missing"
        raise ValueError(f"{wrong}; usage: {USAGE}")
    parts = [part for part in given.get("parts", ",".join(PARTS)).split(",") if part]
    device, shape = given.get("device", "cuda"), given.get("shape", "real")
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts={part} is none of {', '.join(PARTS)}")
    if device not in ("cuda", "cpu") or shape not in ("real", "tiny"):
        raise ValueError(f"device= is cuda or cpu, shape= real or tiny; usage: {USAGE}")
    try:
        seconds, layers = float(given.get("seconds", "530")), int(given.get("layers", "12"))
    except ValueError:
        raise ValueError(f"seconds= and layers= take numbers; usage: {USAGE}") from None
    out = Path(given["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    batches = Path(given.get("batches", "runs/bench/demo_batches.npz")).resolve()
    words = [f"shape={shape}", f"layers={layers}", f"batches={batches}", f"device={device}"]
    run_parts(out, parts, words, started + seconds, device)
    facts = machine.facts(["python", "-m", "tools.benchmarks.gpu", *arguments])
    where = "; ".join(f"{name} {version}" for name, version in facts["versions"].items())
    trial = "**A trial of the script on a CPU: nothing below is a GPU's figure.**\n\n"
    title = "# One GPU\n\n" + (trial if device == "cpu" else "")
    header = (
        f"{title}{facts['date']}; commit {facts['commit']}; "
        f"{facts['hardware']}; {where}; `{facts['command']}`; "
        f"{time.monotonic() - started:.0f} s in all"
    )
    reports = [read_report(out / f"{part}.json", part) for part in parts]
    text = as_text(reports, header)
    results: dict[str, Any] = {"device": device, "shape": shape, "facts": facts}
    results["parts"] = [{**asdict(report), "path": ""} for report in reports]
    for name, content in (
        ("tables.md", text),
        ("results.json", json.dumps(results, indent=1) + "\n"),
    ):
        with replacing(out / name) as file:
            file.write(content.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(run(main))
