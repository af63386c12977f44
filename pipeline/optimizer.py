"""Megatron's AdamW and its learning-rate schedule, one peak rate per module."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from conf.schema import ParallelConfig, PrecisionConfig, StageConfig
from pipeline.stages import MODULE_PATTERNS, trainable_modules


def build_optimizer(
    models: Sequence[torch.nn.Module],
    stage: StageConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
) -> MegatronOptimizer:
    """AdamW over the parameters that require gradients.

    Biases and other vectors are not decayed (Megatron's standard rule); each module of
    `stage.lr` gets its own peak and floor rate.
    """
    from megatron.core.optimizer import get_standard_config_overrides

    bf16 = precision.params == "bf16"
    recipe = stage.optimizer
    peak = max(stage.lr.vision, stage.lr.connector, stage.lr.language)
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=peak,
        min_lr=peak * recipe.min_lr_ratio,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_eps=recipe.eps,
        clip_grad=recipe.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        **_memory(parallel, precision),
    )
    overrides: dict[ParamKey, Any] = dict(get_standard_config_overrides(config))
    for name in sorted(trainable_modules(stage.lr)):
        rate = getattr(stage.lr, name)
        overrides[ParamKey(name=MODULE_PATTERNS[name])] = {
            "max_lr": rate,
            "min_lr": rate * recipe.min_lr_ratio,
            # Not read by the schedule. Megatron-core 0.16 recognises a loaded parameter group by
            # this and not by `max_lr`; without it two modules' groups are taken for one.
            "lr_mult": rate / peak,
        }
    return get_megatron_optimizer(config, list(models), config_overrides=overrides)


def _memory(parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, Any]:
    """Optimizer states of fewer bytes, or on the host. `conf.check_memory` says what they need.

    BF16 states are Transformer Engine's: moments in BF16 and, as master weights, only what BF16
    weights lack of FP32 (2 + 2 + 2 bytes a parameter instead of 12). Beside FP8 weights (but not
    with the delayed recipe) Megatron keeps the master weights itself, in FP32.

    An offloaded share lives and is updated on the host, in FP32, while the rest is updated on the
    GPU (HybridDeviceOptimizer, which takes the precision-aware path with FP32 states).
    """
    settings: dict[str, Any] = {}
    if precision.fp8_params:
        settings["fp8_recipe"] = precision.fp8_recipe
    if parallel.optimizer_states == "bf16":
        settings.update(
            use_precision_aware_optimizer=True,
            exp_avg_dtype=torch.bfloat16,
            exp_avg_sq_dtype=torch.bfloat16,
        )
    if parallel.optimizer_offload > 0:
        settings.update(
            use_precision_aware_optimizer=True,
            optimizer_cpu_offload=True,
            optimizer_offload_fraction=parallel.optimizer_offload,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
    return settings


def build_schedule(
    optimizer: MegatronOptimizer, stage: StageConfig, steps: int
) -> OptimizerParamScheduler:
    """Linear warmup from zero, then decay to the floor at the last step."""
    recipe = stage.optimizer
    peak = max(stage.lr.vision, stage.lr.connector, stage.lr.language)
    warmup = min(round(recipe.warmup_ratio * steps), steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=peak * recipe.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=recipe.schedule,
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rates(optimizer: MegatronOptimizer) -> list[float]:
    """The distinct rates now in force, highest first."""
    return sorted({float(group["lr"]) for group in optimizer.param_groups}, reverse=True)
