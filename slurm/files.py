"""Writing so that a kill at any instant leaves the last good state readable."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename: a reader sees the old text or the new, never a part."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_directory(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line, on disk when this returns; a line that a kill cut before it stays by itself."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        whole = not size or (file.seek(size - 1) is not None and file.read(1) == b"\n")
        file.write(("" if whole else "\n").encode() + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, replacing an older one at once."""
    aside = link.with_name(f"{link.name}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
