"""Weights of a Hugging Face directory, whole, as the safetensors library reads and writes them."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every file, by name."""
    files = sorted(directory.glob("*.safetensors"))
    assert files, f"no weights in {directory}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_weights(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """`model.safetensors` of these tensors."""
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
