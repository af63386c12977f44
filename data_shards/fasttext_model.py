"""A supervised fastText model that tells pt-PT from pt-BR, where a site has staged one.

The file comes from outside and is checked in full before the library, written in C++, reads it.
fastText's own `predict` fails with NumPy 2 in some builds of the package, so this asks the compiled
layer beneath it, which all of them have.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_shards.fasttext_file import ModelError, check_file

LABELS = ("pt-PT", "pt-BR", "undecided", "other")
PREFIX = "__label__"
LEAST = 0.7  # probability under which the model counts as undecided
MOST_CHARACTERS = 20_000  # of a text, as for the rules
# Labels as models on the web call them (fasttext-euptvid: PT_PT and PT_BR), in lower case with -.
KNOWN = {
    "pt-pt": "pt-PT",
    "ptpt": "pt-PT",
    "pt": "pt-PT",
    "eu": "pt-PT",
    "european": "pt-PT",
    "por-pt": "pt-PT",
    "pt-br": "pt-BR",
    "ptbr": "pt-BR",
    "br": "pt-BR",
    "brazilian": "pt-BR",
    "por-br": "pt-BR",
}


@dataclass(frozen=True)
class ModelVerdict:
    """The label and its probability."""

    label: str
    probability: float


class FastTextModel:
    """Loads the model at `path` (.bin or .ftz).

    Its labels are those in `KNOWN`; where it has others, a file beside it, `PATH.labels.yaml`, maps
    each of them to one of `LABELS`.

    Raises:
        ModelError: no such model, labels that nobody maps, or the fasttext package is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_file(self.path)
        self._model = _load(self.path)
        self._labels = self._mapped()

    def classify(self, text: str) -> ModelVerdict:
        """The most probable label; "undecided" under a probability of 0.7."""
        line = " ".join(text[:MOST_CHARACTERS].split())
        if not line:
            return ModelVerdict("undecided", 0.0)
        try:
            found = self._model.predict(f"{line}\n", 1, 0.0, "strict")
        except RuntimeError as error:
            raise ModelError(
                f"{self.path} gives no probabilities ({error}); stage it again"
            ) from None
        if not found:
            return ModelVerdict("undecided", 0.0)
        probability, label = found[0]
        probability = min(float(probability), 1.0)  # fastText adds 1e-5
        if not math.isfinite(probability) or probability < LEAST:
            return ModelVerdict("undecided", probability if math.isfinite(probability) else 0.0)
        return ModelVerdict(self._labels[label], probability)

    def _mapped(self) -> dict[str, str]:
        names, counts = self._model.getLabels("strict")
        given = _given(self.path)
        unknown, mapped = [], {}
        for name in names:
            short = name.removeprefix(PREFIX)
            plain = short.lower().replace("_", "-")
            if (label := given.get(short, KNOWN.get(plain))) is None:
                unknown.append(short)
            else:
                mapped[name] = label
        if unknown or not {"pt-PT", "pt-BR"} <= set(mapped.values()):
            what = (
                f"labels {', '.join(sorted(unknown)[:8])}" if unknown else "labels of one variety"
            )
            raise ModelError(
                f"{self.path} has {what}; write {labels_file(self.path).name} beside it, a line "
                f"LABEL: ONE OF {', '.join(LABELS)} for each label of the model"
            )
        return mapped


def labels_file(path: Path) -> Path:
    """Where the names of a model's labels are mapped to ours."""
    return path.with_name(f"{path.name}.labels.yaml")


def file_digest(path: str | Path) -> str:
    """SHA-256 of the model and of the file that names its labels; part of what decides labels.

    Raises:
        ModelError: the model is not one.
    """
    check_file(Path(path))
    digest = hashlib.sha256()
    for part in (Path(path), labels_file(Path(path))):
        if part.exists():
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _given(path: Path) -> Mapping[str, str]:
    file = labels_file(path)
    if not file.exists():
        return {}
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ModelError(
            f"{file} is not YAML ({' '.join(str(error).split())}); correct it"
        ) from None
    if not isinstance(given, dict) or not set(given.values()) <= set(LABELS):
        raise ModelError(f"{file} must map each label to one of {', '.join(LABELS)}; correct it")
    return {str(name).removeprefix(PREFIX): label for name, label in given.items()}


def _load(path: Path) -> Any:
    try:
        import fasttext_pybind
    except ImportError:
        raise ModelError(
            f"{path} needs the fasttext package, which is not installed: make setup with the extra "
            "[variety], or set data.variety_model to null"
        ) from None
    model = fasttext_pybind.fasttext()
    try:
        model.loadModel(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{path} is damaged ({error}); stage it again") from None
    return model
