"""Predicted bytes are those of real Megatron objects on the CPU."""

from pathlib import Path

import pytest

from tools.plan.cost import disk_of
from tools.plan.cpu_memory import (
    compare,
    job_of,
    measure_checkpoint,
    measure_saved,
    saved_bytes,
    small_config,
    small_model,
)


@pytest.fixture(scope="module")
def comparisons() -> dict[str, float]:
    return {one.name: one.error for one in compare()}


def test_weights_gradients_and_optimizer_to_the_byte(comparisons: dict[str, float]) -> None:
    states = {k: v for k, v in comparisons.items() if k.split(",")[0] in KINDS}
    assert len(states) == 9 and set(states.values()) == {0.0}


KINDS = ("weights", "gradients", "optimizer")


def test_saved_activations(comparisons: dict[str, float]) -> None:
    # To the byte with torch 2.13; another release may keep a small tensor more or less.
    errors = {k: v for k, v in comparisons.items() if k.split(",")[0] not in KINDS}
    assert len(errors) == 5
    for name, error in errors.items():
        assert abs(error) < 0.02, name


def test_a_storage_is_counted_once_and_parameters_are_not() -> None:
    import torch

    layer = torch.nn.Linear(8, 8)
    rows = torch.randn(4, 8, requires_grad=True)
    with saved_bytes(layer) as found:
        hidden = layer(rows)  # keeps rows
        (hidden * hidden.view(4, 8)).sum()  # keeps hidden, twice
    assert sum(found.values()) == 2 * 4 * 8 * 4


def test_chunked_loss_keeps_no_logits() -> None:
    chunked = "parallel.loss_chunk=64"
    few = measure_saved(small_config(small_model(words=256), "precision=bf16", chunked))
    many = measure_saved(small_config(small_model(words=512), "precision=bf16", chunked))
    assert few == many


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_is_as_large_as_planned(precision: str, tmp_path: Path) -> None:
    overrides = (f"precision={precision}", "parallel.distributed_optimizer=true")
    config = small_config(small_model(words=2048), *overrides)
    planned = disk_of(job_of(config), config)
    files = measure_checkpoint(config, tmp_path)
    assert len(files) == planned.files
    # Beside the tensors: names, shapes and an archive's header of each, 3 kB for 200 of them.
    written = sum(path.stat().st_size for path in files)
    assert planned.checkpoint < written < planned.checkpoint + 200 * 4096
