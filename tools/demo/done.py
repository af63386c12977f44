"""What a finished part of the demo was made from, so that it is made once."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DEMO = Path(__file__).parent


# What decides the pictures and the words.
DATA_FILES = ("canvases", "chats", "evaluation", "language", "pairs", "questions", "sources")
# What decides a backbone: its own code, and the words for the one, the pixels for the other.
BACKBONE_FILES = {
    "vision": ("canvases", "optimizers", "tiles", "vision_pretraining"),
    "language": (
        *DATA_FILES,
        "corpus",
        "language_pretraining",
        "optimizers",
        "text_grids",
        "tiles",
        "tokenizer",
    ),
}


def settings_digest(settings: Any, files: Sequence[str]) -> str:
    """SHA-256 (hex) of settings and of the code of `files`, modules of this package."""
    code = {name: (_DEMO / f"{name}.py").read_text(encoding="utf-8") for name in sorted(files)}
    text = json.dumps([settings, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(marker: Path, digest: str) -> bool:
    """Whether `marker` says that the part was finished from these very settings."""
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("digest") == digest


def write_done(marker: Path, digest: str, record: dict[str, Any]) -> None:
    """Last of all: the part exists when its marker does."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    aside = marker.with_name(marker.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"digest": digest, **record}, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(marker)
