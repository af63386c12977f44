"""Whether a stage is done and its checkpoint is all there: the condition of what comes after."""

import hashlib
import json
from pathlib import Path
from typing import Any

DONE, FAILED, STOP, MANIFEST = "DONE.json", "FAILED.json", "STOP", "MANIFEST.json"


def verify(stage_dir: Path) -> str | None:
    """None when the stage may be built upon, else one line saying why not.

    The manifest is compared with the digest in DONE.json, files by presence and size: the next
    stage reads every byte anyway, and compares it with the manifest before it uses any.
    """
    path = stage_dir / DONE
    if not path.is_file():
        return _unfinished(stage_dir)
    remedy = f"restore the checkpoint, or remove {path} and run {stage_dir.name} again"
    try:
        done = _mapping(path)
        checkpoint = (stage_dir / str(done["checkpoint"])).resolve()
        if not checkpoint.is_relative_to(stage_dir.resolve()):
            return f"{path} names a checkpoint outside its folder: {done['checkpoint']}"
        manifest = checkpoint / MANIFEST
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
        if digest != done["checkpoint_digest"]:
            return f"{manifest} is not the one that {path} names; {remedy}"
        for name, (size, _) in sorted(_mapping(manifest)["files"].items()):
            file = checkpoint / name
            if file.resolve().parent != checkpoint:
                return f"{manifest} lists {name!r}, outside its folder; {remedy}"
            if not file.is_file():
                return f"{file} is missing; {remedy}"
            if file.stat().st_size != size:
                return f"{file} has {file.stat().st_size} bytes, not {size}; {remedy}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing; {remedy}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path} or its manifest is damaged ({error}); {remedy}"
    return None


def refusal(stage_dir: Path) -> str | None:
    """Why nothing of the stage may start, or None: it gave up, or somebody asked it to stop."""
    failed = stage_dir / FAILED
    if failed.is_file():
        return f"gave up: {failure(stage_dir)} ({failed}); mend it and submit the run again"
    for stop in (stage_dir.parent / STOP, stage_dir / STOP):
        if stop.exists():
            return f"asked to stop by {stop}; remove it and submit the run again"
    return None


def failure(stage_dir: Path) -> str:
    """The reason in FAILED.json."""
    try:
        return str(_mapping(stage_dir / FAILED)["reason"])
    except (OSError, ValueError, KeyError):
        return "for a reason that cannot be read"


def _unfinished(stage_dir: Path) -> str:
    reason = refusal(stage_dir)
    if reason is None:
        reason = f"not done after its last segment; submit the run again to go on ({stage_dir})"
    return f"{stage_dir.name} {reason}"


def _mapping(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no record")
    return value
