"""Guard for the one pickled file of a torch_dist checkpoint, `.metadata`.

torch's reader unpickles it without limits; this reads it first through an unpickler that knows
only the classes torch and Megatron put there, so a checkpoint from elsewhere executes nothing.
"""

import pickle
from pathlib import Path
from typing import Any

from pipeline.manifest import CheckpointError

_ALLOWED = (
    {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "Metadata",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    }
    | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("torch", "device"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("pathlib._local", "PosixPath"),
    }
)
_DTYPES = {
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")


def check_metadata(directory: Path) -> None:
    """Refuse a checkpoint whose `.metadata` holds anything but shapes and offsets.

    Raises:
        CheckpointError: naming the file and what it wanted to load.
    """
    read_metadata(directory)


def read_metadata(directory: Path) -> Any:
    """The checkpoint's index, a `torch.distributed.checkpoint.metadata.Metadata`.

    Raises:
        CheckpointError: as `check_metadata`, or it is no such index.
    """
    path = directory / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not hasattr(metadata, "state_dict_metadata") or not metadata.storage_data:
            raise ValueError("it lists no tensors")
        return metadata
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        MemoryError,  # of a length that a flipped bit made huge
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint index that can be trusted ({error or 'no memory'}); "
            "use another checkpoint"
        ) from None
