"""Is this export the model that was trained? Certificate or reasons.

    python -m tools.parity_gate stage=runs/NAME/stage3 hf=DIR [parallel=tp2 ...]
        [python=/other/venv/bin/python] [tokens=64] [only=files|network]

Compares, in this order: checksums, settings, tensor names, weights both ways bit for bit, image
tokens of many sizes, chats as tokens by every way of rendering, pixels, image features, logits,
likeliest tokens and greedy answers, in float32. Writes DIR/parity.json, the certificate, when all
of it passes; an older one is removed first. `parallel=` runs the trainer's side under that layout.
Needs as much memory as the network takes in float32; exit status 1 where something differs.
"""

import hashlib
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from conf.compose import compose, from_mapping, to_mapping
from conf.schema import Config
from models.anyres import AnyresGeometry
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.files import digest_and_fsync, write_json
from pipeline.handoff import read_done
from pipeline.manifest import MANIFEST
from tools.command import required, run, split_arguments
from tools.hf_export import default_tokenizer, model_of
from tools.parity import files
from tools.parity.cases import cases
from tools.parity.finding import Finding
from tools.parity.network import GREEDY, Sides, compare, layout_name, tokenizer_of
from tools.parity.our_side import OurSide
from tools.parity.processor import check_counts
from tools.processor_files import special_tokens

USAGE = "python -m tools.parity_gate stage=runs/NAME/stage3 hf=DIR [parallel=...] [python=...]"
CERTIFICATE = "parity.json"
FORMAT = 1


def check(
    stage: Path,
    export: Path,
    config: Config,
    python: Path,
    tokens: int = GREEDY,
    only: str = "",
) -> list[Finding]:
    """Everything that is compared; printed as it comes."""
    done = read_done(stage)
    model = model_of(done, stage)
    geometry = AnyresGeometry.from_model(model)
    findings: list[Finding] = []

    def add(*new: Finding) -> None:
        for finding in new:
            findings.append(finding)
            print(finding.line(), flush=True)

    def say(message: str) -> None:
        print(f"     {message}", flush=True)

    checkpoint = stage / done.checkpoint
    if only != "network":
        add(files.check_checksums(export, say))
        add(files.check_fields(export, model))
        add(files.check_names(export, model))
        if findings[-1].passed:
            with CheckpointTensors(checkpoint) as source:
                add(files.check_weights_out(export, source, model))
                add(files.check_weights_back(export, source, model))
        add(check_counts(export, geometry))
    if only != "files":
        tokenizer = default_tokenizer(stage)
        config = from_mapping({**to_mapping(config), "model": dict(done.model)}, str(stage))
        our = OurSide(tokenizer_of(tokenizer), geometry, config)
        try:
            rounded = files.dtype_of(export)
            bos = special_tokens(tokenizer).bos
            sides = Sides(export, checkpoint, our, bos, python, tokens, rounded)
            add(*compare(sides, cases(geometry), say))
        except ValueError as error:
            add(Finding("both networks", False, str(error)))
    return findings


def certificate(stage: Path, export: Path, findings: list[Finding], layout: str) -> dict[str, Any]:
    """What stands in parity.json: which files, which checkpoint, what was compared."""
    done = read_done(stage)
    sums = export / files.CHECKSUMS
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "export_sha256sums": hashlib.sha256(sums.read_bytes()).hexdigest(),
        "checkpoint_manifest": digest_and_fsync(stage / done.checkpoint / MANIFEST)[1],
        "stage": done.stage,
        "step": done.step,
        "layout": layout,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "findings": [finding.as_json() for finding in findings],
    }


def certify(
    stage: Path, export: Path, config: Config, python: Path, tokens: int = GREEDY, only: str = ""
) -> bool:
    """Compare, and write the certificate; False where only a part was asked for.

    Raises:
        ValueError: something differs.
    """
    (export / CERTIFICATE).unlink(missing_ok=True)
    findings = check(stage, export, config, python, tokens, only)
    failed = [finding.name for finding in findings if not finding.passed]
    if failed:
        raise ValueError(f"{export} is NOT the model of {stage}: {', '.join(failed)}")
    if only or tokens < GREEDY:
        return False
    layout = layout_name(config.parallel)
    write_json(export / CERTIFICATE, certificate(stage, export, findings, layout))
    return True


def certified(export: Path) -> bool:
    """Whether a certificate stands beside the very files that it was made for."""
    path, sums = export / CERTIFICATE, export / files.CHECKSUMS
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        digest = hashlib.sha256(sums.read_bytes()).hexdigest()
        return bool(value["format"] == FORMAT and value["export_sha256sums"] == digest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, overrides = split_arguments(arguments, ("stage", "hf", "python", "tokens", "only"))
    stage, export = required(ours, "stage", USAGE), required(ours, "hf", USAGE)
    only = ours.get("only", "")
    if not ours.get("tokens", "1").isdigit() or only not in ("", "files", "network"):
        raise ValueError(f"tokens= takes a number, only= files or network; {USAGE}")
    config = compose(overrides)
    if config.parallel.context > 1:
        raise ValueError("parallel.context: the gate compares whole rows; use a layout without it")
    python = Path(ours.get("python") or sys.executable)
    tokens = int(ours.get("tokens") or GREEDY)
    if certify(stage, export, config, python, tokens, only):
        print(f"{export} is the model of {stage}: {export / CERTIFICATE}")
    else:
        print("all of this is the same; a certificate needs every part and 64 tokens")


if __name__ == "__main__":
    sys.exit(run(main))
