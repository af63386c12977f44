"""Transformer Engine's layers against Megatron's local ones and transformers, same weights."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import ParallelConfig, PrecisionConfig
from data_shards.batch import PackedBatch
from models.hf_state import from_hf, to_hf
from models.llava_next import LlavaNext
from tools.benchmarks.gpu.context import Context, local_layers, relative
from tools.benchmarks.gpu.report import Report, one_line
from tools.benchmarks.synthetic import packed_row, row_documents

# A BF16 network is as far from FP32 as BF16 makes it: Transformer Engine's kernels may round
# elsewhere than local layers do, but not be further off than FACTOR times local layers' distance.
FACTOR = 1.5
FP8_LIMIT = 0.25  # of the losses; products of FP8 are off by some 0.05 each
GRADIENTS = {
    "vision": "vision_tower.encoder.layers.0.mlp.linear_fc1.weight",
    "connector": "connector.linear_fc1.weight",
    "first layer": "language_model.decoder.layers.0.self_attention.linear_qkv.weight",
    "output layer": "language_model.output_layer.weight",
}


@dataclass(frozen=True)
class Outcome:
    """What one implementation computed; losses [targets], gradients by name of `GRADIENTS`."""

    losses: Tensor
    gradients: dict[str, Tensor]


def _network(
    context: Context, precision: PrecisionConfig, local: bool, state: dict[str, Tensor] | None
) -> LlavaNext:
    """The parity model, with weights of Hugging Face's names where given."""
    from models.build import build_model

    model = context.shapes.parity
    with local_layers() if local else contextlib.nullcontext():
        network = build_model(
            model, ParallelConfig(), precision, pre_process=True, post_process=True
        )
    network = network.to(context.device).train()  # torch's norms are made on the CPU
    if state is not None:
        own = dict(network.named_parameters())
        fused = any(name.endswith("layer_norm_weight") for name in own)
        with torch.no_grad():
            for name, tensor in from_hf(state, model, fused_norms=fused).items():
                own[name].copy_(tensor)
    return network


def _run(context: Context, network: LlavaNext, batch: PackedBatch) -> Outcome:
    from pipeline.batch import DeviceBatch

    held = DeviceBatch.from_packed(batch, context.device)
    losses_T = network(**held.model_inputs()).reshape(-1)
    mask_T = held.loss_mask_T > 0
    (losses_T[mask_T].sum() / mask_T.sum()).backward()
    own = dict(network.named_parameters())
    gradients = {}
    for what, name in GRADIENTS.items():
        gradient = own[name].grad
        assert gradient is not None
        gradients[what] = gradient.float().cpu()
    return Outcome(losses_T[mask_T].detach().float().cpu(), gradients)


def _transformers_losses(context: Context, state: dict[str, Tensor], batch: PackedBatch) -> Tensor:
    """Loss of each target by transformers in BF16, one document at a time."""
    from models.anyres import AnyresGeometry
    from tools.benchmarks.documents import (
        IGNORED,
        padded_for_transformers,
        split,
        transformers_twin,
    )

    shapes, model = context.shapes, context.shapes.parity
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    network = transformers_twin(model, ids)
    network.load_state_dict(_under_names_of(network.state_dict(), state))
    network = network.to(context.device, torch.bfloat16).train()
    documents = row_documents(model, shapes.parity_tokens, shapes.mixture)
    parts = split(
        batch,
        [tokens for tokens, _ in documents],
        [[size] if size else [] for _, size in documents],
        AnyresGeometry.from_model(model),
    )
    found = []
    for document in parts:
        inputs = padded_for_transformers([document], pad_id=0)
        labels = inputs.pop("labels")[0, 1:].to(context.device)
        inputs = {name: value.to(context.device) for name, value in inputs.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with torch.no_grad():
            logits = network(**inputs, use_cache=False).logits[0, :-1].float()
        keep = labels != IGNORED
        found.append(
            torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none")
        )
    return torch.cat(found).float().cpu()


def _under_names_of(own: Iterable[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On-disk names (4.57.6) -> those of the module in memory (`model.` in front)."""
    found = {}
    for name in own:
        bare = name.removeprefix("model.")
        inner = bare.replace("language_model.", "language_model.model.", 1)
        tower = bare.replace("vision_tower.", "vision_tower.vision_model.", 1)
        names = [n for n in (bare, inner, tower, f"language_model.{bare}") if n in state]
        if not names:
            raise ValueError(f"no weight for {name}; another release of transformers?")
        found[name] = state[names[0]]
    return found


def run(context: Context, report: Report) -> None:
    """One row an implementation: how far from local layers in FP32."""
    shapes = context.shapes
    columns = ["implementation", "losses", *GRADIENTS, "limit of losses", "within"]
    table = report.table("Relative distance from local layers in FP32", columns)
    batch = packed_row(shapes.parity, shapes.parity_tokens, shapes.mixture, seed=0)
    torch.manual_seed(0)
    network = _network(context, PrecisionConfig("fp32"), True, None)
    state = {
        name: tensor.detach().cpu()
        for name, tensor in to_hf(dict(network.named_parameters()), shapes.parity).items()
    }
    exact = _run(context, network, batch)
    report.note(f"mean loss in FP32: {float(exact.losses.mean()):.5f}")
    del network
    context.free()
    limits: dict[str, float] = {}

    def one(name: str, precision: PrecisionConfig, local: bool) -> None:
        found = _run(context, _network(context, precision, local, state), batch)
        distance = relative(found.losses, exact.losses)
        gradients = [relative(found.gradients[what], exact.gradients[what]) for what in GRADIENTS]
        if local:
            limits["bf16"] = max(FACTOR * distance, 1e-4)
        limit = FP8_LIMIT if precision.fp8_recipe else limits["bf16"]
        fine = distance <= limit
        report.row(table, name, distance, *gradients, limit, "yes" if fine else "NO")

    bf16 = PrecisionConfig("bf16")
    report.attempt("local layers", lambda: one("local layers, BF16", bf16, True))
    context.free()
    if context.cuda:
        for name, precision in context.precisions.items():
            report.attempt(
                name,
                lambda n=name, p=precision: one(f"Transformer Engine, {n}", p, False),  # type: ignore[misc]
            )
            context.free()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        report.note(f"transformers is not compared here: {one_line(error)}")
        return

    def theirs() -> None:
        distance = relative(_transformers_losses(context, state, batch), exact.losses)
        nothing = [None] * len(GRADIENTS)
        fine = "yes" if distance <= limits["bf16"] else "NO"
        report.row(table, "transformers, BF16", distance, *nothing, limits["bf16"], fine)

    report.attempt("transformers", theirs)
