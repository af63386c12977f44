"""The pieces alone: matrix products by recipe, packed attention, SigLIP's head size of 72."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models.layer_specs import layer_spec
from models.transformer_configs import language_config, vision_config
from tools.benchmarks.gpu.context import Context, relative
from tools.benchmarks.gpu.report import Report
from tools.benchmarks.gpu.shapes import FP8_RECIPES

# Largest relative error of a product of normal numbers. BF16 keeps 8 bits (2^-9 = 0.002 a
# rounding), E4M3 keeps 4 (2^-4 / sqrt(3) = 0.036 for each factor), E5M2, of gradients, 3 (0.072).
LIMITS = {"fp32": 1e-5, "bf16": 5e-3, "tensorwise": 0.12, "blockwise": 0.08, "delayed": 0.12}
ATTENTION_LIMIT = 1e-2  # BF16 in and out, against FP32


def _te_recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    hybrid = recipe.Format.HYBRID
    return {
        "tensorwise": lambda: recipe.Float8CurrentScaling(fp8_format=hybrid),
        "blockwise": lambda: recipe.Float8BlockScaling(fp8_format=recipe.Format.E4M3),
        "delayed": lambda: recipe.DelayedScaling(
            fp8_format=hybrid, amax_history_len=16, amax_compute_algo="max"
        ),
    }[name]()


def _product(name: str, context: Context) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A linear layer and its weight: Transformer Engine's on the GPU."""
    rows, columns = (4096, 12288) if context.cuda else (64, 96)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    if not context.cuda:
        linear = torch.nn.Linear(rows, columns, bias=False, dtype=dtype)
        return linear, linear.weight
    import transformer_engine.pytorch as te  # type: ignore[import-not-found]

    linear = te.Linear(rows, columns, bias=False, params_dtype=dtype, device="cuda")
    if name not in FP8_RECIPES:
        return linear, linear.weight
    recipe = _te_recipe(name)

    def forward(x: Tensor) -> Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            return linear(x)

    return forward, linear.weight


def product_errors(name: str, context: Context) -> tuple[list[float], float]:
    """Relative errors of y, dx and dW against float32, and TFLOP/s of forward and backward."""
    forward, weight = _product(name, context)
    count = 4096 if context.cuda else 32
    x = torch.randn(count, weight.shape[1], device=context.device, dtype=weight.dtype)
    g = torch.randn(count, weight.shape[0], device=context.device, dtype=weight.dtype)
    x.requires_grad_()
    for _ in range(3):  # `delayed` knows its scales after the first
        x.grad = weight.grad = None
        y = forward(x)
        y.backward(g)
    assert x.grad is not None and weight.grad is not None
    exact = weight.detach().float(), x.detach().float(), g.float()
    errors = [
        relative(y, exact[1] @ exact[0].t()),
        relative(x.grad, exact[2] @ exact[0]),
        relative(weight.grad, exact[2].t() @ exact[1]),
    ]
    if not context.cuda:
        return errors, 0.0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    milliseconds = []
    for _ in range(20):
        events[0].record()
        forward(x).backward(g)
        events[1].record()
        torch.cuda.synchronize()
        milliseconds.append(events[0].elapsed_time(events[1]))
    middle = sorted(milliseconds)[len(milliseconds) // 2]
    return errors, 6 * count * weight.numel() / middle / 1e9


def _expected(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[S, heads, D] in float32."""
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)
    return out[0].transpose(0, 1)


def _core(model: ModelConfig, causal: bool) -> tuple[Callable[..., Tensor], Any]:
    """The attention core as a training job builds and calls it, in BF16; its configuration."""
    arguments = model, ParallelConfig(), PrecisionConfig("bf16")
    config = language_config(*arguments) if causal else vision_config(*arguments)
    attention = layer_spec(config, causal).submodules.self_attention
    mask_type = attention.params["attn_mask_type"]
    core = build_module(
        attention.submodules.core_attention,
        config=config,
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
    )
    return partial(core, attention_mask=None, attn_mask_type=mask_type), config


def packed_attention_errors(model: ModelConfig, context: Context) -> list[float]:
    """Output and gradients of a packed row against one document at a time."""
    core, _ = _core(model, causal=True)
    text, lengths = model.text, [104, 304, 616]
    ends = torch.tensor([0, 104, 408, 1024], dtype=torch.int32, device=context.device)
    shape = (1024, text.heads, text.head_dim), (1024, text.kv_heads, text.head_dim)
    made = [torch.randn(s, device=context.device, dtype=torch.bfloat16) for s in (*shape, shape[1])]
    ours = [x.clone().requires_grad_() for x in made]
    exact = [x.float().requires_grad_() for x in made]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    out = core(*ours, packed_seq_params=packed).reshape(shape[0])
    parts = zip(*(x.split(lengths) for x in exact), strict=True)
    expected = torch.cat([_expected(q, k, v, True) for q, k, v in parts])
    gradient = torch.randn_like(expected)
    out.backward(gradient.to(out.dtype))
    expected.backward(gradient)
    return [relative(out, expected), *_gradient_errors(ours, exact)]


def vision_attention_errors(model: ModelConfig, context: Context) -> list[float]:
    """Output and gradients of the vision tower's attention (`sbhd`, no mask)."""
    core, config = _core(model, causal=False)
    patches = model.vision.grid**2
    shape = (patches, 2, config.num_attention_heads, config.kv_channels)
    made = [torch.randn(shape, device=context.device, dtype=torch.bfloat16) for _ in range(3)]
    ours = [x.clone().requires_grad_() for x in made]
    exact = [x.float().requires_grad_() for x in made]
    out = core(*ours).reshape(shape)
    q, k, v = exact
    tiles = [_expected(q[:, n], k[:, n], v[:, n], False) for n in range(2)]
    expected = torch.stack(tiles, dim=1)
    gradient = torch.randn_like(expected)
    out.backward(gradient.to(out.dtype))
    expected.backward(gradient)
    return [relative(out, expected), *_gradient_errors(ours, exact)]


def _gradient_errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    errors = []
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        errors.append(relative(mine.grad, theirs.grad))
    return errors


def run(context: Context, report: Report) -> None:
    """Versions, then one row a check."""
    if context.cuda:
        import transformer_engine
        import transformer_engine.pytorch as te

        report.note(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Transformer Engine "
            f"{transformer_engine.__version__}, cuDNN {torch.backends.cudnn.version()}; FP8 "
            f"{te.is_fp8_available()}, blockwise {te.is_fp8_block_scaling_available()}"
        )
    table = report.table(
        "Pieces against float32", ["what", "largest error", "limit", "within", "TFLOP/s"]
    )

    def add(what: str, errors: list[float], limit: float, speed: float | None = None) -> None:
        fine = max(errors) <= limit
        report.row(table, what, max(errors), limit, "yes" if fine else "NO", speed or None)
        report.data[what] = errors

    for name in context.precisions:
        report.attempt(
            f"product in {name}",
            lambda name=name: add(  # type: ignore[misc]
                f"product in {name}", *_with_limit(product_errors(name, context), LIMITS[name])
            ),
        )
    model = context.shapes.parity
    head = model.vision.hidden_size // model.vision.heads
    attention = {
        "packed causal attention (thd)": packed_attention_errors,
        f"vision attention, head size {head}": vision_attention_errors,
    }
    for what, errors in attention.items():
        report.attempt(
            what,
            lambda w=what, e=errors: add(w, e(model, context), ATTENTION_LIMIT),  # type: ignore[misc]
        )


def _with_limit(found: tuple[list[float], float], limit: float) -> tuple[list[float], float, float]:
    return found[0], limit, found[1]
