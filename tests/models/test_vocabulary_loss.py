"""The loss by chunks against torch's own cross entropy, and what it allocates.

Tolerances: float32 losses 5e-6 of values up to 15 and gradients 1e-5 of their largest entry
(another order of summation); BF16 equal to Megatron's own loss bit for bit but for the
weight's gradient, where each chunk's is rounded: at most 1.3 times its distance from the truth.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import ParallelConfig
from tests.distributed import megatron, run_ranks

TOKENS, HIDDEN, VOCABULARY = 48, 6, 64


def problem(targets: int = 19) -> dict[str, Tensor]:
    """Hidden states, weights, labels, a mask, and how much each token's loss counts."""
    draw = torch.Generator().manual_seed(0)
    mask = torch.zeros(TOKENS)
    mask[torch.randperm(TOKENS, generator=draw)[:targets]] = 1
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=draw),
        "weight": torch.randn(VOCABULARY, HIDDEN, generator=draw),
        "labels": torch.randint(VOCABULARY, (TOKENS,), generator=draw),
        "mask": mask,
        "scale": torch.randn(TOKENS, generator=draw),
    }


def expected(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and both gradients in float64, by torch."""
    hidden = given["hidden"].double().requires_grad_()
    weight = given["weight"].double().requires_grad_()
    losses = F.cross_entropy(hidden @ weight.t(), given["labels"], reduction="none")
    losses = losses * given["mask"]
    (losses * given["scale"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def output_layer(parallel: ParallelConfig, given: dict[str, Tensor], chunk: int, dtype: Any) -> Any:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from models.vocabulary_loss import OutputLayer

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=dtype,
    )
    linear = ColumnParallelLinear(
        HIDDEN, VOCABULARY, config=config, init_method=config.init_method, bias=False
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    linear.weight.data.copy_(given["weight"].chunk(parallel.tensor)[rank])
    return OutputLayer(linear, chunk)


def loss_worker(
    parallel: ParallelConfig,
    given: dict[str, Tensor],
    chunk: int,
    dtype: Any = torch.float32,
    masked: bool = True,
    frozen: bool = False,
    buffer: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses, this rank's share of the hidden states' gradient, weight.grad, main_grad."""
    with megatron(parallel):
        from megatron.core import parallel_state

        layer = output_layer(parallel, given, chunk, dtype)
        layer.weight.requires_grad_(not frozen)
        if buffer is not None:
            layer.weight.main_grad = torch.ones(layer.weight.shape, dtype=buffer)
        hidden = given["hidden"].to(dtype)
        if parallel.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            hidden = hidden.chunk(parallel.tensor)[rank]
        hidden = hidden[:, None].clone().requires_grad_()
        losses = layer(
            hidden, labels_T=given["labels"], loss_mask_T=given["mask"] if masked else None
        )
        (losses * given["scale"] * given["mask"]).sum().backward()
        assert hidden.grad is not None
        grad, buffered = layer.weight.grad, getattr(layer.weight, "main_grad", None)
        return losses.detach(), hidden.grad.squeeze(1), grad, buffered


TP1, TP2 = ParallelConfig(), ParallelConfig(2, tensor=2)
TP2_SP = ParallelConfig(2, tensor=2, sequence_parallel=True)


@pytest.mark.parametrize(
    ("parallel", "chunk"),
    [(TP1, 0), (TP1, 1), (TP1, 19), (TP1, 4096), (TP2, 0), (TP2, 7), (TP2_SP, 0), (TP2_SP, 7)],
    ids=["TP1", "TP1 by 1", "TP1 by 19", "TP1 by 4096", "TP2", "TP2 by 7", "TP2+SP", "TP2+SP by 7"],
)
def test_equals_cross_entropy(parallel: ParallelConfig, chunk: int) -> None:
    """With a mask and without, whatever each token's loss counts, ragged last chunk."""
    given = problem()
    losses, to_hidden, to_weight = expected(given)
    for masked in (True, False):
        answers = run_ranks(parallel.tensor, loss_worker, parallel, given, chunk, masked=masked)
        found_hidden = answers[0][1]
        if parallel.sequence_parallel:
            found_hidden = torch.cat([answer[1] for answer in answers])
        found_weight = torch.cat([answer[2] for answer in answers])
        for answer in answers:
            worst = (answer[0] * given["mask"] - losses).abs().max()
            assert float(worst) < 5e-6
            assert bool((answer[0][given["mask"] == 0] == 0).all()) == masked
        assert float((found_hidden - to_hidden).abs().max()) < 1e-5 * float(to_hidden.abs().max())
        assert float((found_weight - to_weight).abs().max()) < 1e-5 * float(to_weight.abs().max())


@pytest.mark.parametrize(
    ("chunk", "buffer", "untouched"),
    [(0, torch.float32, True), (5, torch.float32, False), (5, torch.bfloat16, True)],
)
def test_gradients_are_added_to_megatrons_buffer(
    chunk: int, buffer: torch.dtype, untouched: bool
) -> None:
    """What it holds already stays, and it and what autograd delivers are the whole; a BF16 buffer
    is too coarse to add chunks up in."""
    given = problem()
    ((_, _, grad, held),) = run_ranks(1, loss_worker, TP1, given, chunk, buffer=buffer)
    assert torch.equal(held, torch.ones_like(held)) == untouched
    to_weight = expected(given)[2]
    assert float((held - 1 + grad - to_weight).abs().max()) < 1e-5 * float(to_weight.abs().max())


@pytest.mark.parametrize("parallel", [TP1, TP2_SP], ids=["TP1", "TP2+SP"])
def test_frozen_output_layer_passes_gradients_on(parallel: ParallelConfig) -> None:
    given = problem()
    answers = run_ranks(parallel.tensor, loss_worker, parallel, given, 7, frozen=True)
    found = torch.cat([answer[1] for answer in answers])
    to_hidden = expected(given)[1]
    assert float((found - to_hidden).abs().max()) < 1e-5 * float(to_hidden.abs().max())
    assert all(answer[2] is None for answer in answers)


@pytest.mark.parametrize("parallel", [TP1, TP2, TP2_SP], ids=["TP1", "TP2", "TP2+SP"])
def test_row_without_targets(parallel: ParallelConfig) -> None:
    """Zero losses, zero gradients, and all ranks come back."""
    for chunk in (0, 7):
        for losses, to_hidden, to_weight, _ in run_ranks(
            parallel.tensor, loss_worker, parallel, problem(targets=0), chunk
        ):
            assert losses.shape == (TOKENS,) and not losses.any() and not to_hidden.any()
            assert to_weight is not None and not to_weight.any()


def megatron_loss_worker(
    parallel: ParallelConfig, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in BF16 by Megatron's output layer and `vocab_parallel_cross_entropy`."""
    with megatron(parallel):
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        layer = output_layer(parallel, given, 0, torch.bfloat16)
        hidden = given["hidden"].bfloat16()[:, None].clone().requires_grad_()
        logits, _ = layer(hidden)
        losses = vocab_parallel_cross_entropy(logits, given["labels"][:, None]).squeeze(1)
        (losses * given["scale"] * given["mask"]).sum().backward()
        assert hidden.grad is not None
        return losses.detach() * given["mask"], hidden.grad.squeeze(1), layer.weight.grad


@pytest.mark.parametrize("parallel", [TP1, TP2], ids=["TP1", "TP2"])
def test_bf16_is_as_exact_as_megatron(parallel: ParallelConfig) -> None:
    given = {name: t if name == "labels" else t.bfloat16().float() for name, t in problem().items()}
    exact = expected(given)[2]
    theirs = run_ranks(parallel.tensor, megatron_loss_worker, parallel, given)
    for chunk in (0, 7):
        ours = run_ranks(parallel.tensor, loss_worker, parallel, given, chunk, torch.bfloat16)
        assert ours[0][0].dtype == torch.float32 and ours[0][2].dtype == torch.bfloat16
        torch.testing.assert_close(ours[0][0], theirs[0][0], atol=5e-6, rtol=0)
        assert torch.equal(ours[0][1], theirs[0][1])
        mine, megatrons = (torch.cat([answer[2] for answer in side]) for side in (ours, theirs))
        if chunk == 0:
            assert torch.equal(mine, megatrons)
        error = float((mine - exact).norm())
        assert error < 1.3 * float((megatrons - exact).norm())
        assert error < 0.01 * float(exact.norm())


class LargestTensors(TorchDispatchMode):
    """Remembers the shapes of all results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def allocation_worker(parallel: ParallelConfig, given: dict[str, Tensor], chunk: int) -> set:
    """Shapes of everything made in forward and backward pass."""
    with megatron(parallel):
        layer = output_layer(parallel, given, chunk, torch.float32)
        hidden = given["hidden"][:, None].clone().requires_grad_()
        with LargestTensors() as seen:
            layer(hidden, labels_T=given["labels"], loss_mask_T=given["mask"]).sum().backward()
        return seen.shapes


@pytest.mark.parametrize("parallel", [TP1, TP2], ids=["TP1", "TP2"])
def test_logits_exist_by_chunks_only(parallel: ParallelConfig) -> None:
    given = problem(targets=30)
    width = VOCABULARY // parallel.tensor

    def rows(chunk: int) -> int:
        answers = run_ranks(parallel.tensor, allocation_worker, parallel, given, chunk)
        return max(s[0] for a in answers for s in a if len(s) == 2 and s[1] == width and s[0] > 0)

    assert rows(8) == 8
    assert rows(0) == 30, "without a chunk size all targets, but nobody else"
    biggest = [
        torch.Size(shape).numel()
        for answer in run_ranks(parallel.tensor, allocation_worker, parallel, given, 4)
        for shape in answer
    ]
    assert max(biggest) < TOKENS * width, "nothing is as large as the row's logits"
