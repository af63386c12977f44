"""Recomputation changes what is kept, never a gradient."""

from collections import Counter
from typing import Any

import torch

from conf.schema import ParallelConfig
from models.llava_next import LlavaNext
from tests.distributed import megatron, run_ranks
from tests.models.tiny import documents, hf_twin, megatron_state, micro_batch, tiny_model
from tests.parity.layouts import build_loaded

# Forward passes of the four decoder layers' parts and of the three vision layers, where the
# backward pass runs them again.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "none": ({}, {"layer": 4, "mlp": 4, "norm": 8, "core": 4, "vision": 3}),
    "mlp": (
        {"recompute": "selective", "recompute_modules": ["mlp"]},
        {"layer": 4, "mlp": 8, "norm": 8, "core": 4, "vision": 6},
    ),
    "core_attn": (
        {"recompute": "selective", "recompute_modules": ["core_attn"]},
        {"layer": 4, "mlp": 4, "norm": 8, "core": 8, "vision": 6},
    ),
    "full": ({"recompute": "full"}, {"layer": 8, "mlp": 8, "norm": 16, "core": 8, "vision": 6}),
    "the first layer": (
        {"recompute": "full", "recompute_layers": 1},
        {"layer": 5, "mlp": 5, "norm": 10, "core": 5, "vision": 6},
    ),
}


def _count(model: LlavaNext) -> Counter[str]:
    """Forward passes from now on."""
    seen: Counter[str] = Counter()

    def watch(name: str, *modules: torch.nn.Module) -> None:
        for module in modules:
            module.register_forward_pre_hook(lambda *_: seen.update([name]))

    for layer in model.language_model.decoder.layers:
        watch("layer", layer)
        watch("mlp", layer.mlp)
        watch("norm", layer.input_layernorm, layer.pre_mlp_layernorm)
        watch("core", layer.self_attention.core_attention)
    watch("vision", *model.vision_tower.encoder.layers)
    return seen


def _gradients(
    settings: dict[str, Any], trained: set[str], state: Any, batch: Any
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    with megatron(ParallelConfig()):
        model = build_loaded(tiny_model(), ParallelConfig(**settings), state)
        model.freeze(trained)
        model.train()
        seen = _count(model)
        losses_T = model(**{k: v for k, v in batch.items() if k != "loss_mask_T"})
        (losses_T * batch["loss_mask_T"]).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found, dict(seen)


def _all_cases(state: Any, batch: Any) -> list[str]:
    """What differs from training without recomputation."""
    wrong = []
    everything = {"vision", "connector", "language"}
    wanted, _ = _gradients({}, everything, state, batch)
    for name, (settings, passes) in CASES.items():
        found, seen = _gradients(settings, everything, state, batch)
        if seen != passes:
            wrong.append(f"{name}: {seen} forward passes instead of {passes}")
        if set(found) != set(wanted):
            wrong.append(f"{name}: gradients of other parameters")
        wrong += [f"{name}: {n}" for n in wanted if not torch.equal(found[n], wanted[n])]
    frozen = {"connector"}  # stage 1: the tower has no backward pass, the decoder passes on
    wanted, _ = _gradients({}, frozen, state, batch)
    found, seen = _gradients({"recompute": "full"}, frozen, state, batch)
    if (seen["vision"], seen["layer"]) != (3, 8):
        wrong.append(f"frozen: {seen}")
    wrong += [f"frozen: {n}" for n in wanted if not torch.equal(found[n], wanted[n])]
    return wrong


def test_gradients_are_the_same_bit_for_bit() -> None:
    model = tiny_model()
    batch = micro_batch(model, [documents(model)[:4]], 512)
    state = megatron_state(hf_twin(model), model)
    assert run_ranks(1, _all_cases, state, batch) == [[]]
