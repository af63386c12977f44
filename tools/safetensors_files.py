"""Weights as Hugging Face directories keep them: one safetensors file, or several and an index.

Pickled weights (`pytorch_model.bin`) are refused: unpickling a file runs what is in it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.files import digest_and_fsync, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what transformers 4.57.6 uses
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
REMEDY = "get the checkpoint again"


def files_of(directory: Path) -> tuple[dict[str, str], list[Path]]:
    """(tensor name -> file name as the index promises, files) of a checkpoint directory.

    Raises ValueError (missing or pickled weights, damaged index), naming file and remedy.
    """
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; give a Hugging Face checkpoint directory"
        )
    if (directory / SINGLE).is_file():
        return {}, [directory / SINGLE]
    if not (directory / INDEX).is_file():
        if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
            raise ValueError(
                f"{directory} holds pickled weights only, which can run code when read; "
                "convert them to safetensors first (transformers: save_pretrained)"
            )
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}; {REMEDY}")
    index = read_json(directory / INDEX, "the weights' index", REMEDY)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{directory / INDEX} has no weight_map; {REMEDY}")
    promised = {str(name): str(file) for name, file in names.items()}
    for file in sorted(set(promised.values())):
        if not _SHARD_NAME.fullmatch(file):
            raise ValueError(f"{directory / INDEX} names {file!r}, not a file of its own directory")
    return promised, [directory / file for file in sorted(set(promised.values()))]


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, by name, on the CPU, in its own dtype.

    Raises ValueError (missing, damaged or pickled weights), naming file and remedy.
    """
    promised, files = files_of(directory)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read_file(file))
    absent = sorted(set(promised) - set(tensors))
    if absent:
        raise ValueError(
            f"{directory / INDEX} promises tensor {absent[0]} ({len(absent)} in all), "
            f"which {promised[absent[0]]} does not hold; {REMEDY}"
        )
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from None


def write_weights(
    tensors: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors` into `directory`, in shards when they exceed `shard_bytes`, and fsync."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
            "weight_map": {
                name: file
                for file, shard in zip(files, shards, strict=True)
                for name in sorted(shard)
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, shard in zip(files, shards, strict=True):
        # A copy each: safetensors refuses views that share memory.
        whole = {name: _own_memory(tensor) for name, tensor in shard.items()}
        save_file(whole, directory / file, metadata={"format": "pt"})
        digest_and_fsync(directory / file)


def _own_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    owns = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == (
        tensor.numel() * tensor.element_size()
    )
    return tensor if owns else tensor.clone(memory_format=torch.contiguous_format)
