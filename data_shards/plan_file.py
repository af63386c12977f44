"""A plan on disk: computed once, mapped into memory by every rank, used again on resume.

    FOLDER/KIND-DIGEST/plan.json      inputs, digest, figures, and the columns' shapes
    FOLDER/KIND-DIGEST/offsets.npy    and samples, tiles, attention (data_shards/plan.py)

DIGEST is of everything that the plan is a function of, so a folder is never stale: other inputs
have another name. It is written aside and renamed, so it is whole or absent.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conf.schema.data import DataConfig
from conf.schema.stage import StageConfig
from data_shards.durable import sync_directory
from data_shards.manifest import Manifest
from data_shards.manifest_index import (
    DamagedIndex,
    column_digest,
    map_column,
    read_sealed,
    write_sealed,
)
from data_shards.plan import (
    Plan,
    PlanError,
    build_plan,
    drawn_manifests,
    plan_digest,
    plan_inputs,
    sequential_plan,
)
from data_shards.plan_writer import COLUMNS

FILE = "plan.json"
KINDS = {"training": build_plan, "sequential": sequential_plan}
_FACTS = (
    "steps",
    "packs_per_step",
    "sequence_length",
    "document_multiple",
    "refused",
    "report",
    "inputs",
    "contents",
)
_STALE = 24 * 3600.0  # seconds: what a killed planner left behind


def plan_folder(root: Path, inputs: Mapping[str, Any]) -> Path:
    """Where the plan with these inputs (`plan_inputs`) lies under `root`."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return root / f"{inputs['kind']}-{digest[:16]}"


def ensure_plan(
    kind: str,
    root: Path,
    manifests: Mapping[str, Manifest],
    data: DataConfig,
    stage: StageConfig,
    say: Callable[[str], None] = print,
) -> Plan:
    """The plan of this kind (training, sequential), read in full, or computed and written.

    Before computing, every column of the manifests is checked. Several processes may do this at
    the same time; they write the same.

    Raises:
        PlanError, ManifestError: as `build_plan`; a manifest is damaged.
    """
    folder = plan_folder(root, plan_inputs(kind, manifests, data, stage))
    if folder.exists():
        try:
            return read_plan(folder, verify=True)
        except PlanError as error:
            say(f"WARNING: {error}; it is computed again")
            _remove(folder)
    began = time.monotonic()
    for manifest in drawn_manifests(manifests, data, stage).values():
        manifest.verify_index()
    root.mkdir(parents=True, exist_ok=True)
    _tidy(root)
    aside = root / f".{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        plan = KINDS[kind](manifests, data, stage, aside)
        facts = {name: getattr(plan, name) for name in ("names", "digest", *_FACTS)}
        shapes = {name: list(getattr(plan, name).shape) for name in COLUMNS}
        write_sealed(aside / FILE, {**facts, "shapes": shapes})
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster; it wrote the same.
        sync_directory(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(
        f"{kind} plan of {plan.steps} steps: {plan.report['samples']} samples in "
        f"{plan.report['packs']} packs, {plan.report['efficiency']:.1%} real tokens, made in "
        f"{time.monotonic() - began:.0f} s"
    )
    return read_plan(folder)


def read_plan(folder: Path, verify: bool = False) -> Plan:
    """Map a plan that `ensure_plan` wrote; with `verify`, read it in full first.

    Raises:
        PlanError: it is missing or damaged; names the file and the cause.
    """
    try:
        facts = read_sealed(folder / FILE)
        columns: dict[str, Any] = {
            name: map_column(folder / f"{name}.npy", dtype, facts["shapes"][name])
            for name, (dtype, _) in COLUMNS.items()
        }
        digest = plan_digest(facts["inputs"], facts["contents"])
        plan = Plan(
            digest=digest,
            names=tuple(facts["names"]),
            **columns,
            **{name: facts[name] for name in _FACTS},
        )
        if digest != facts["digest"] or len(plan.offsets) != plan.steps * plan.packs_per_step + 1:
            raise DamagedIndex(f"{folder / FILE} does not match its columns")
        if verify:
            for name in COLUMNS:
                if column_digest(folder / f"{name}.npy") != facts["contents"][name]:
                    raise DamagedIndex(f"{folder / name}.npy does not match its digest")
    except DamagedIndex as error:
        raise PlanError(str(error)) from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise PlanError(f"{folder / FILE} is damaged ({error})") from None
    return plan


def _remove(folder: Path) -> None:
    """Out of sight first: a plan that is there is whole."""
    aside = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(root: Path) -> None:
    """Drop what planners left that were killed; those at work now are younger."""
    for path in root.glob(".*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # another process was faster
