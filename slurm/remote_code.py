"""The code that goes to another host: what git has committed, packed by nemo-run."""

import hashlib
import subprocess
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from conf.schema.errors import ConfigError
from conf.snapshot import PACKAGES

REPOSITORY = Path(__file__).resolve().parent.parent
GIT_SECONDS = 30
NAMED = 8  # changed files that a message lists


@dataclass(frozen=True)
class Package:
    """An archive of one commit."""

    path: Path
    commit: str
    sha256: str
    size: int  # bytes


def head(repository: Path = REPOSITORY) -> str:
    """The commit that is checked out. ConfigError where there is none."""
    return _git(repository, "rev-parse", "--verify", "HEAD^{commit}").strip()


def refuse_uncommitted(repository: Path = REPOSITORY) -> None:
    """ConfigError naming the files that would run here and not there."""
    status = _git(
        repository, "status", "--porcelain", "-z", "--untracked-files=all", "--", *PACKAGES
    )
    entries = iter(status.split("\0"))
    changed = []
    for entry in entries:
        if entry:
            changed.append(entry[3:])
            if entry[0] in "RC":
                next(entries, "")  # the name before
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise ConfigError(
            f"{len(changed)} uncommitted: {', '.join(changed[:NAMED])}{more}; only committed code "
            "is sent, so commit (or remove) them first"
        )


def package(commit: str, into: Path, repository: Path = REPOSITORY) -> Package:
    """Archive `commit` below `into`, by nemo-run's GitArchivePackager."""
    from nemo_run.core.packaging.git import GitArchivePackager

    top = Path(_git(repository, "rev-parse", "--show-toplevel").rstrip("\n"))
    below = repository.relative_to(top.resolve()).as_posix()
    packager = GitArchivePackager(
        ref=commit, subpath="" if below == "." else below, include_submodules=False
    )
    try:
        # The packager puts the path that it is given into a shell line as it is.
        with chdir(repository):
            path = Path(packager.package(Path("."), str(into), "code"))
    except (subprocess.SubprocessError, RuntimeError) as error:
        raise ConfigError(f"git archive of {commit[:12]} failed: {_one_line(error)}") from error
    content = path.read_bytes()
    return Package(path, commit, hashlib.sha256(content).hexdigest(), len(content))


def _git(repository: Path, *words: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(repository), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_SECONDS,
        ).stdout
    except FileNotFoundError as error:
        raise ConfigError("git is not installed here, and what is sent is a commit") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"{repository} has no commit to send ({_one_line(error.stderr)}); work from a git "
            "clone of this repository"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"git said nothing for {GIT_SECONDS} s in {repository}") from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
