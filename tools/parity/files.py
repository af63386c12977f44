"""What can be told of an export without running the network: files, fields, names, weights."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from conf.schema import ModelConfig
from models.hf_state import match_llava, table
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.files import read_json
from tools.export_weights import blocks, convert
from tools.hf_config import llava_config
from tools.import_weights import lazy_parts
from tools.parity.finding import Finding, yes_or_no
from tools.processor_files import processor_settings, special_ids
from tools.safetensors_reader import SafetensorsDirectory

CHECKSUMS = "SHA256SUMS"
# Fields that say how the folder was made, not what the model is.
_HISTORY = ("transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path")


def check_checksums(export: Path, say: Callable[[str], None]) -> Finding:
    """Every file that SHA256SUMS lists, and no weights that it does not."""
    path = export / CHECKSUMS
    if not path.is_file():
        return Finding("checksums", False, f"{path} is missing; export again")
    listed: dict[str, str] = {}
    problems = []
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if Path(name).name != name:
            problems.append(f"{CHECKSUMS} names {name!r}, outside the folder")
            continue
        listed[name] = digest
        if not (export / name).is_file():
            problems.append(f"{name} is missing")
            continue
        with open(export / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                problems.append(f"{name} was changed")
        say(f"{name} read")
    problems += [
        f"{file.name} is not listed"
        for file in sorted(export.glob("*.safetensors"))
        if file.name not in listed
    ]
    return yes_or_no("checksums", problems, f"{len(listed)} files are as they were written")


def check_fields(export: Path, model: ModelConfig) -> Finding:
    """The settings of model, generation and processor against the trained model."""
    problems = []
    ids = special_ids(export)
    found = read_json(export / "config.json", "the configuration", "export again")
    problems += _differences(found, llava_config(model, ids, str(found.get("dtype"))), "")
    others = {**processor_settings(model), "generation_config.json": ids}
    for name, expected in others.items():
        if not (export / name).is_file():
            problems.append(f"{name} is missing")
            continue
        problems += _differences(
            read_json(export / name, "settings", "export again"), expected, name
        )
    return yes_or_no("settings", problems, "every field is the trained model's")


def _differences(found: Any, expected: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    prefix = f"{where}: " if where.endswith(".json") else where
    for key, value in expected.items():
        if key in _HISTORY:
            continue
        theirs = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(value, Mapping):
            problems += _differences(theirs, value, f"{prefix}{key}.")
        elif theirs != value:
            problems.append(f"{prefix}{key} is {_short(theirs)}, trained with {_short(value)}")
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dtype_of(export: Path) -> str:
    """The dtype of an export's weights, as torch names it. ValueError where they cannot be read."""
    with SafetensorsDirectory(export) as source:
        return str(source.dtype("image_newline")).removeprefix("torch.")


def check_names(export: Path, model: ModelConfig) -> Finding:
    """Names and shapes of all tensors."""
    try:
        with SafetensorsDirectory(export) as source:
            match_llava(source.shapes(), model)
            count = len(source.shapes())
            expected = sum(len(entry.hf) for entry in table(model))
    except ValueError as error:
        return Finding("tensor names", False, str(error))
    same = count == expected
    return Finding("tensor names", same, f"{count} tensors, {expected} in the model")


def check_weights_out(export: Path, source: CheckpointTensors, model: ModelConfig) -> Finding:
    """The checkpoint's numbers, split as the export splits them, bit for bit in the export."""
    problems, count = [], 0
    rounded: set[str] = set()
    with SafetensorsDirectory(export) as target:
        names = _their_names(target, model)
        for entry in table(model):
            for name, first, rows in blocks(source, entry):
                theirs = names[name]
                stored = target.read(theirs, first, len(rows))
                if stored.dtype != rows.dtype:
                    rounded.add(f"{rows.dtype} to {stored.dtype}".replace("torch.", ""))
                if not torch.equal(convert(rows, stored.dtype, name), stored):
                    problems.append(f"{theirs} differs from the checkpoint")
                count += rows.numel()
    how = f", rounded from {' and '.join(sorted(rounded))}" if rounded else ""
    return yes_or_no(
        "weights, out", sorted(set(problems)), f"{count:,} numbers equal bit for bit{how}"
    )


def check_weights_back(export: Path, source: CheckpointTensors, model: ModelConfig) -> Finding:
    """The export's numbers, joined as the import joins them, bit for bit in the checkpoint."""
    problems, count = [], 0
    layers = {
        "vision_tower.encoder.layers": model.vision.layers_used,
        "language_model.decoder.layers": model.text.layers,
    }
    with SafetensorsDirectory(export) as target:
        matches = match_llava(target.shapes(), model)
        dtype = target.dtype(matches[0].theirs[0])
        for part in lazy_parts(target, matches, dtype, layers):
            stored = source.read_part(part.name, part.start, part.shape)
            if not torch.equal(convert(stored, dtype, part.name), part.read()):
                problems.append(f"{part.name} {list(part.start)} differs from the checkpoint")
            count += stored.numel()
    return yes_or_no("weights, back", problems, f"{count:,} numbers equal bit for bit")


def _their_names(target: SafetensorsDirectory, model: ModelConfig) -> dict[str, str]:
    return {
        ours: theirs
        for match in match_llava(target.shapes(), model)
        for ours, theirs in zip(match.entry.hf, match.theirs, strict=True)
    }
