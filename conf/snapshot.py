"""The code snapshot of a run: what it holds, its digest, and whether somebody has edited it.

Jobs run `runs/NAME/code/`; plan.json records its digest, code.sha256 that of every file (in the
format of `sha256sum --check`), so that an edited file can be named.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("conf", "data_shards", "models", "pipeline", "slurm", "tools")
SUFFIXES = (".py", ".yaml", ".jinja", ".html")
CODE, LISTING, PLAN = "code", "code.sha256", "plan.json"


def source_files(root: Path) -> list[Path]:
    """What a snapshot of the repository, or of a snapshot, under `root` holds, sorted."""
    return sorted(
        path
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and "__pycache__" not in path.parts
    )


def file_digests(root: Path) -> dict[str, str]:
    """Path relative to `root` -> SHA-256, in the order of `source_files`."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source_files(root)
    }


def combined(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the paths and digests of a snapshot."""
    digest = hashlib.sha256()
    for path, of_file in digests.items():
        digest.update(path.encode() + b"\0" + bytes.fromhex(of_file))
    return digest.hexdigest()


def code_digest(root: Path) -> str:
    """SHA-256 over the paths and contents of the packages under `root`."""
    return combined(file_digests(root))


def listing(digests: Mapping[str, str]) -> str:
    """The text of code.sha256."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests.items())


def difference(run_dir: Path) -> str | None:
    """None when the run's snapshot is the one that was submitted, else one line naming a file."""
    plan, code = run_dir / PLAN, run_dir / CODE
    remedy = "submit the run again, which takes a new snapshot"
    try:
        recorded = json.loads(plan.read_text(encoding="utf-8"))["code"]
    except FileNotFoundError:
        return f"{plan} is missing; {remedy}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{plan} is damaged ({error}); {remedy}"
    found = file_digests(code)
    if combined(found) == recorded:
        return None
    named = _first_difference(run_dir / LISTING, found, str(recorded))
    return (
        f"the code in {code} is not what was submitted{named}; {remedy}, or restore the file "
        f"(sha256sum --check ../{LISTING} in it says which)"
    )


def _first_difference(listed: Path, found: Mapping[str, str], recorded: str) -> str:
    try:
        lines = [line.split("  ", 1) for line in listed.read_text(encoding="utf-8").splitlines()]
        before = {path: digest for digest, path in lines}
        if combined(before) != recorded:
            return ""  # the listing has been touched as well
    except (OSError, ValueError):
        return ""
    for path in sorted(set(before) | set(found)):
        if path not in found:
            return f" ({path} is missing)"
        if path not in before:
            return f" ({path} was added)"
        if before[path] != found[path]:
            return f" ({path} was edited)"
    return ""
