"""A crude energon data set as its users would read it. Runs only where energon can be imported.

    .venv-energon/bin/python tools/benchmarks/data/energon_samples.py FOLDER

prints a JSON line for each sample of the split `val`: its key, and the SHA-256 of each member.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.energon import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)


@edataclass
class Parts(Sample):  # type: ignore[misc, unused-ignore]
    """The members of one sample, undecoded."""

    parts: dict[str, bytes]


@stateless
def _cook(sample: dict[str, Any]) -> Parts:
    members = {name: value for name, value in sample.items() if not name.startswith("_")}
    return Parts(**basic_sample_keys(sample), parts=members)


class _Encoder(DefaultTaskEncoder):  # type: ignore[misc, unused-ignore]
    """Samples as they are: no decoding, no batches."""

    cookers = [Cooker(_cook)]
    decoder = None


def loader(folder: Path) -> Iterable[Parts]:
    """The split `val`, one pass in order, read in this process.

    Args:
        folder: what `energon prepare` was given.
    """
    return _loader(get_val_dataset(folder, split_part="val", **_shared()))


def endless(folder: Path) -> Iterable[Parts]:
    """The split `train`, over and over, without a shuffling buffer, read in this process."""
    options = {"shuffle_buffer_size": None, "max_samples_per_sequence": None}
    return _loader(get_train_dataset(folder, split_part="train", **options, **_shared()))


def _shared() -> dict[str, Any]:
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    return {"worker_config": workers, "batch_size": None, "task_encoder": _Encoder()}


def _loader(dataset: Any) -> Iterable[Parts]:
    warnings.filterwarnings("ignore", message=".*pin_memory")  # without a GPU
    found: Iterable[Parts] = get_loader(dataset)
    return found


def main(folder: str) -> None:
    """The command."""
    for sample in loader(Path(folder)):
        parts = {k: hashlib.sha256(data).hexdigest() for k, data in sample.parts.items()}
        print(json.dumps({"key": sample.__key__, "parts": parts}))


if __name__ == "__main__":
    main(sys.argv[1])
