"""Where Hugging Face directories keep weights: one safetensors file, or several and an index.

Pickled weights (`pytorch_model.bin`) are refused: unpickling a file runs what is in it.
"""

import re
from pathlib import Path

from pipeline.files import read_json

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
