"""What runs on the remote host before any of this repository is there; sent as `python -c`.

    check COMMIT MODULE...                   -> one line of JSON: Python, modules, the code
    unpack ARCHIVE SHA256 COMMIT PACKAGE...  -> code/COMMIT, or what is wrong with the archive

Both run in REMOTE_DIR.  Standard library only, for any Python 3.7 or newer, so that an old one can
say that it is.  The code lies in `code/COMMIT/`, whose COMMIT.json records its digest: a copy that
somebody edited is never run under the commit's name.
"""

import hashlib
import importlib.util
import json
import os
import posixpath
import re
import shutil
import sys
import tarfile
import time
from typing import Any, Dict, List  # noqa: UP035

# ruff: noqa: UP006, UP031 -- an old Python must be able to run this far

MARK = "amalia-vl-remote "  # before the answer, which a login banner may precede
RECORD = "COMMIT.json"
KEPT = 5  # copies of the code; a queued job runs its run's own snapshot, never these
STALE_SECONDS = 86400.0


def digest(root: str) -> str:
    """SHA-256 over the paths and contents below `root`; caches and the record left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [os.path.join(folder, name) for name in names]
    total = hashlib.sha256()
    for path in sorted(found):
        name = os.path.relpath(path, root)
        if name != RECORD:
            with open(path, "rb") as file:
                content = hashlib.sha256(file.read()).digest()
            total.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return total.hexdigest()


def state(code: str) -> str:
    """Whether a copy of the code is `there`, `absent`, or `edited` since it came."""
    if not os.path.isdir(code):
        return "absent"
    try:
        with open(os.path.join(code, RECORD), encoding="utf-8") as file:
            recorded = json.load(file)["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return "edited"
    return "there" if recorded == digest(code) else "edited"


def check(commit: str, modules: List[str]) -> Dict[str, Any]:
    """What the laptop must know of this host. Marks the copy of the code as used now."""
    code = os.path.join("code", commit)
    found = state(code)
    if found == "there":
        os.utime(os.path.join(code, RECORD))
    return {
        "python": sys.executable,
        "version": list(sys.version_info[:3]),
        "missing": [name for name in modules if importlib.util.find_spec(name) is None],
        "directory": os.getcwd(),
        "code": found,
    }


def unpack(archive: str, sha256: str, commit: str, packages: List[str]) -> None:
    """Put the archive's packages at code/COMMIT, whole or not at all. Raises ValueError, OSError.

    Only plain files below `packages` are taken, whatever else the archive holds.
    """
    with open(archive, "rb") as file:
        if hashlib.sha256(file.read()).hexdigest() != sha256:
            raise ValueError("the code came damaged; run the same command again")
    target = os.path.join("code", commit)
    aside = archive + ".d"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = posixpath.normpath(member.name)
            source = tar.extractfile(member) if member.isfile() else None
            if source is None or name.split("/")[0] not in packages:
                continue
            path = os.path.join(aside, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                shutil.copyfileobj(source, file)
    with open(os.path.join(aside, RECORD), "w", encoding="utf-8") as record:
        json.dump({"commit": commit, "digest": digest(aside)}, record)
        record.flush()
        os.fsync(record.fileno())
    try:
        os.rename(aside, target)
    except OSError:
        if state(target) != "there":  # else another submit of the same commit was faster
            raise
        shutil.rmtree(aside, ignore_errors=True)
    os.remove(archive)
    prune(commit)


def prune(used: str) -> None:
    """Keep the newest copies of the code, and nothing that an ended transfer left behind."""
    copies = []
    for name in os.listdir("code"):
        path = os.path.join("code", name)
        record = os.path.join(path, RECORD)
        if re.match(r"[0-9a-f]{40}$", name) and name != used and os.path.exists(record):
            copies.append((os.path.getmtime(record), path))
        elif name.startswith(".incoming-") and os.path.getmtime(path) < time.time() - STALE_SECONDS:
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.remove(path)
    for _, path in sorted(copies)[: max(0, len(copies) + 1 - KEPT)]:
        shutil.rmtree(path, ignore_errors=True)


def main(words: List[str]) -> int:
    try:
        if words[0] == "check":
            print(MARK + json.dumps(check(words[1], words[2:])))
        else:
            unpack(words[1], words[2], words[3], words[4:])
    except (OSError, ValueError, tarfile.TarError) as error:
        print("%s: %s" % (type(error).__name__, error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
