"""Settings that save memory are refused where they would do nothing, or could not run.

Recomputation: what Megatron-core's dense layers know (0.16.1, transformer_layer.py and
attention.py), and what is left of it under Transformer Engine. Optimizer: which machines and which
other settings its two memory savers need. Asked at submit, where `cluster` answers for the nodes,
and again on the node.
"""

from collections.abc import Iterator

from conf.hardware import Hardware
from conf.schema import Config
from conf.schema.errors import ConfigError
from models.pipeline_layout import chunk_layers

# Megatron's other names are of layers we do not have (moe_act, moe, shared_experts, mla_up_proj),
# but for `layernorm`: it needs Transformer Engine, whose norms are part of the matrix products and
# are therefore left alone (transformer_layer.py sees an IdentityOp).
MODULES = ("core_attn", "mlp")


def memory_reasons(config: Config, hardware: Hardware | None) -> Iterator[str]:
    """Why this configuration's memory savers cannot run, or would not save."""
    on_gpus = hardware.cuda if hardware is not None else config.cluster.gpus_per_node > 0
    yield from _recompute(config, on_gpus)
    yield from _states(config, hardware, on_gpus)
    yield from _offload(config, hardware, on_gpus)


def _recompute(config: Config, on_gpus: bool) -> Iterator[str]:
    parallel = config.parallel
    if parallel.recompute == "selective":
        if not parallel.recompute_modules:
            yield (
                "parallel.recompute=selective without parallel.recompute_modules recomputes "
                "nothing; name some, or set parallel.recompute=none"
            )
        for name in parallel.recompute_modules:
            if name not in MODULES:
                yield (
                    f"parallel.recompute_modules names {name!r}, which is none of "
                    f"{', '.join(MODULES)}; take it out"
                )
            elif on_gpus and name == "core_attn":
                yield (
                    "parallel.recompute_modules names 'core_attn', but fused attention, as on a "
                    "GPU, keeps no scores, so nothing is saved; use [mlp], or "
                    "parallel.recompute=full with parallel.recompute_layers"
                )
    if parallel.recompute_layers is None:
        return
    if parallel.recompute != "full":
        yield (
            f"parallel.recompute_layers={parallel.recompute_layers} counts whole layers, but "
            f"parallel.recompute={parallel.recompute}; set parallel.recompute=full, or "
            "parallel.recompute_layers=null"
        )
        return
    try:
        most = max(chunk_layers(config.model, parallel))
    except ConfigError:  # said by the rule of the pipeline
        return
    if not 1 <= parallel.recompute_layers <= most:
        yield (
            f"parallel.recompute_layers={parallel.recompute_layers} is not in [1, {most}], the "
            "layers of a pipeline stage; correct it, or null for all"
        )


def _states(config: Config, hardware: Hardware | None, on_gpus: bool) -> Iterator[str]:
    parallel = config.parallel
    if parallel.optimizer_states != "bf16":
        return
    name, switch = "parallel.optimizer_states=bf16", "use parallel.optimizer_states=fp32"
    if not on_gpus:
        yield f"{name} needs Transformer Engine's optimizer, which runs on GPUs only; {switch}"
    elif hardware is not None and not hardware.transformer_engine:
        yield (
            f"{name} needs Transformer Engine, which is not installed; install the [gpu] extra, "
            f"or {switch}"
        )
    if not parallel.distributed_optimizer:
        yield f"{name} needs parallel.distributed_optimizer=true; set it, or {switch}"
    if config.precision.params != "bf16":
        yield (
            f"{name} keeps the lower half of weights whose upper half is BF16, but "
            f"precision.params={config.precision.params}; use precision=bf16, or {switch}"
        )
    if parallel.optimizer_offload > 0:
        yield (
            f"{name} and parallel.optimizer_offload={parallel.optimizer_offload:g} cannot both "
            "be: what the CPU updates stays in FP32; take one of them"
        )


def _offload(config: Config, hardware: Hardware | None, on_gpus: bool) -> Iterator[str]:
    parallel = config.parallel
    if parallel.optimizer_offload == 0:
        return
    name = f"parallel.optimizer_offload={parallel.optimizer_offload:g}"
    switch = "set parallel.optimizer_offload=0"
    if not on_gpus:
        yield f"{name} moves work from a GPU to the CPU, and there is no GPU; {switch}"
    elif hardware is not None and not hardware.transformer_engine:
        yield (
            f"{name} leaves the rest to Transformer Engine's optimizer, which is not installed; "
            f"install the [gpu] extra, or {switch}"
        )
    if not parallel.distributed_optimizer:
        yield f"{name} needs parallel.distributed_optimizer=true; set it, or {switch}"
    if config.precision.params != "bf16":
        yield f"{name} needs precision.params=bf16; use precision=bf16, or {switch}"
    if config.precision.fp8_params:
        yield (
            f"{name} updates BF16 weights, but precision.fp8_params=true; {switch}, or "
            "precision.fp8_params=false"
        )
