"""MANIFEST.json: what makes a folder of files a checkpoint.

It is written last, lists every file with size and SHA-256, and is checked before a byte of the
checkpoint is parsed.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.files import digest_and_fsync, read_json, write_json

MANIFEST = "MANIFEST.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or does not belong here."""


@dataclass(frozen=True)
class Manifest:
    """Contents of MANIFEST.json."""

    step: int  # optimizer steps done
    samples: int  # training samples seen
    plan_digest: str
    config_digest: str
    layout: dict[str, int]  # sizes by their names in `parallel`; distributed_optimizer 0 or 1
    code_version: str
    files: dict[str, tuple[int, str]]  # name -> bytes, SHA-256


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The last write of a save."""
    write_json(directory / MANIFEST, {"format": _FORMAT, **asdict(manifest)})


def read_manifest(directory: Path) -> Manifest:
    """Parse and check the types of MANIFEST.json.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    path = directory / MANIFEST
    remedy = "remove the folder to fall back to the checkpoint before it"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete; {remedy}")
    try:
        value: dict[str, Any] = read_json(path, "the checkpoint manifest", remedy)
        if value.pop("format") != _FORMAT:
            raise CheckpointError(f"{path} has another format than {_FORMAT}; {remedy}")
        value["files"] = {str(n): (int(s), str(d)) for n, (s, d) in value["files"].items()}
        return Manifest(**value)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from None


def verify_files(directory: Path, manifest: Manifest, names: list[str] | None = None) -> None:
    """Size and SHA-256 of the listed files (all by default).

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    for name in sorted(manifest.files) if names is None else names:
        path = directory / name
        if path.resolve().parent != directory.resolve():
            raise CheckpointError(f"{directory / MANIFEST} lists {name!r}, outside its folder")
        size, digest = manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {MANIFEST} lists it")
        found_size, found_digest = digest_and_fsync(path)
        if found_size != size:
            raise CheckpointError(f"{path} has {found_size} bytes, {MANIFEST} says {size}")
        if found_digest != digest:
            raise CheckpointError(f"{path}: SHA-256 differs from {MANIFEST}; the file is damaged")
