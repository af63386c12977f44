"""Loss of the target tokens from the decoder's last hidden states, without the row's logits.

The logits of 16 k tokens over 128 k words are 4 GB in BF16, their softmax 8 GB in FP32. Here only
tokens that have a target are multiplied with the output layer, `chunk` of them at a time, and the
backward pass multiplies them again. The idea is Cut Cross-Entropy's (Wijmans et al. 2024, arXiv
2411.09009) and Liger-Kernel's (Hsu et al. 2024, arXiv 2410.10989, `fused_linear_cross_entropy`).
Liger computes the gradients in the forward pass, for a loss whose scale it knows. Ours is known in
the backward pass only: a token's weight is the objective's business (a preference loss weighs each
answer by a sigmoid of all its tokens' losses), hence the second product.

The softmax is split over tensor-parallel ranks as in Megatron's `vocab_parallel_cross_entropy`,
and like there everything but the products is FP32. (Megatron's fused variant rounds the gradient
to BF16.)
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor


def _parts(count: int, chunk: int) -> Iterator[slice]:
    for first in range(0, count, chunk or max(count, 1)):
        yield slice(first, first + (chunk or count))


class TokenLosses(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[label] of M tokens out of T.

    Shapes: T tokens of this context-parallel rank, S = T, or T / tp with sequence parallelism; M
    tokens with a target; H hidden size; V vocabulary of this tensor-parallel rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        labels_M: Tensor,
        rows_M: Tensor | None,
        chunk: int,
        keep_logits: bool,
        sequence_parallel: bool,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Losses, float32 [M].

        Args:
            hidden_SH: input of the output layer.
            weight_VH: this rank's rows of it.
            labels_M: int64 token ids of the whole vocabulary.
            rows_M: int64 positions in T, ascending; None: all T.
            chunk: tokens whose logits exist at one time, 0 for all.
            keep_logits: keep them for the backward pass instead of computing them again.
            sequence_parallel: whether the hidden states are shared out over `group`.
            group: the tensor-parallel ranks.
        """
        hidden_MH = _target_rows(hidden_SH, rows_M, group if sequence_parallel else None)
        count, vocabulary = len(labels_M), len(weight_VH)
        local_M = labels_M - group.rank() * vocabulary
        held_M = (local_M >= 0) & (local_M < vocabulary)
        local_M = torch.where(held_M, local_M, 0)
        largest_M, total_M, target_M = hidden_MH.new_empty(3, count, dtype=torch.float32)
        logits: list[Tensor] = []
        for part in _parts(count, chunk):
            logits_CV = hidden_MH[part] @ weight_VH.t()
            largest_M[part] = logits_CV.amax(1)
            # the difference is float32 even where the logits are not
            total_M[part] = (logits_CV - largest_M[part, None]).exp_().sum(1)
            target_M[part] = logits_CV.gather(1, local_M[part, None]).squeeze(1)
            if keep_logits:
                logits.append(logits_CV)
        if group.size() > 1 and count:
            target_M *= held_M
            own_M = largest_M.clone()
            dist.all_reduce(largest_M, op=dist.ReduceOp.MAX, group=group)
            total_M *= (own_M - largest_M).exp_()
            sums_2M = torch.stack([total_M, target_M])
            dist.all_reduce(sums_2M, group=group)
            total_M, target_M = sums_2M
        ctx.chunk, ctx.sequence_parallel, ctx.group = chunk, sequence_parallel, group
        ctx.save_for_backward(
            hidden_SH, weight_VH, rows_M, local_M, held_M, largest_M, total_M, *logits
        )
        return total_M.log() - (target_M - largest_M)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the hidden states and the weight, from those of the losses."""
        hidden_SH, weight_VH, rows_M, local_M, held_M, largest_M, total_M, *logits = (
            ctx.saved_tensors
        )
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        split = ctx.group if ctx.sequence_parallel else None
        hidden_MH = grad_MH = None
        if to_weight or not logits:
            hidden_MH = _target_rows(hidden_SH, rows_M, split)
        if to_hidden:
            grad_MH = hidden_SH.new_empty(len(local_M), hidden_SH.shape[1])
        weight_gradient = _WeightGradient(weight_VH)
        scale_M, target_scale_M = grad_M / total_M, grad_M * held_M
        for number, part in enumerate(_parts(len(local_M), ctx.chunk)):
            if logits:
                logits_CV = logits[number]
            else:
                assert hidden_MH is not None
                logits_CV = hidden_MH[part] @ weight_VH.t()
            # softmax times the token's gradient, less that gradient at the target
            exact_CV = (logits_CV - largest_M[part, None]).exp_().mul_(scale_M[part, None])
            del logits_CV
            each_C = torch.arange(len(exact_CV), device=exact_CV.device)
            exact_CV[each_C, local_M[part]] -= target_scale_M[part]
            grad_CV = exact_CV.to(weight_VH.dtype)
            del exact_CV
            if grad_MH is not None:
                torch.mm(grad_CV, weight_VH, out=grad_MH[part])
            if to_weight:
                assert hidden_MH is not None
                weight_gradient.add(grad_CV, hidden_MH[part])
        grad_SH = None
        if grad_MH is not None:
            grad_SH = _scatter_rows(grad_MH, rows_M, len(hidden_SH), split, ctx.group)
        grad_VH = weight_gradient.result() if to_weight else None
        return grad_SH, grad_VH, None, None, None, None, None, None


def _target_rows(
    hidden_SH: Tensor, rows_M: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """The hidden states of tokens with a target; `group` shares the tokens out."""
    if group is not None:
        whole_TH = hidden_SH.new_empty(len(hidden_SH) * group.size(), hidden_SH.shape[1])
        dist.all_gather_into_tensor(whole_TH, hidden_SH.contiguous(), group=group)
        hidden_SH = whole_TH
    return hidden_SH if rows_M is None else hidden_SH.index_select(0, rows_M)


def _scatter_rows(
    grad_MH: Tensor,
    rows_M: Tensor | None,
    length: int,
    split: dist.ProcessGroup | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Sum over tensor-parallel ranks, put in the tokens' places: the gradient [S, H]."""
    if split is None and group.size() > 1 and len(grad_MH):
        dist.all_reduce(grad_MH, group=group)
    grad_TH = grad_MH
    if rows_M is not None:
        tokens = length if split is None else length * split.size()
        grad_TH = grad_MH.new_zeros(tokens, grad_MH.shape[1]).index_copy_(0, rows_M, grad_MH)
    if split is None:
        return grad_TH
    grad_SH = grad_TH.new_empty(length, grad_TH.shape[1])
    dist.reduce_scatter_tensor(grad_SH, grad_TH, group=split)
    return grad_SH


class _WeightGradient:
    """Sum of the chunks' gradients, added up in float32.

    Where Megatron's gradient buffer (`main_grad`) is float32 it takes all chunks but the last,
    which is returned: autograd delivers one gradient per backward pass, as the buffer's hook wants.
    """

    def __init__(self, weight_VH: Tensor) -> None:
        self.weight_VH = weight_VH
        buffer = getattr(weight_VH, "main_grad", None)
        self.buffered = buffer is not None and buffer.dtype == torch.float32
        self.sum_VH: Tensor | None = buffer if self.buffered else None
        self.last_VH: Tensor | None = None

    def add(self, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        """One chunk."""
        if self.last_VH is not None:
            if self.sum_VH is None:
                self.sum_VH = self.last_VH.float()
            else:
                self.sum_VH.add_(self.last_VH)
            self.last_VH = None  # before the next is made
        self.last_VH = grad_CV.t() @ hidden_CH

    def result(self) -> Tensor:
        """What autograd still has to deliver."""
        if self.last_VH is None:
            return torch.zeros_like(self.weight_VH)
        if self.buffered or self.sum_VH is None:
            return self.last_VH
        return self.sum_VH.add_(self.last_VH).to(self.weight_VH.dtype)


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which given labels returns losses instead of logits.

    A module of its own rather than a function of the weight: with `overlap_param_gather` it is a
    module's call that waits for its parameters.
    """

    def __init__(self, linear: ColumnParallelLinear, chunk: int) -> None:
        """Take over the weight of `linear`, which must have no bias."""
        super().__init__(
            linear.input_size,
            linear.output_size,
            config=linear.config,
            init_method=linear.config.init_method,
            bias=False,
            gather_output=linear.gather_output,
            skip_weight_param_allocation=True,
            tp_group=linear.tp_group,
        )
        self.weight = linear.weight
        self.chunk = chunk

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels_T: Tensor | None = None,
        loss_mask_T: Tensor | None = None,
    ) -> Any:
        """Without labels as the base class; with them the loss of each token, float32 [T].

        Args:
            input_: hidden states [T (/ tp with sequence parallelism), 1, H].
            labels_T: int64 [T].
            loss_mask_T: [T], 0 where a token has no target: its loss is 0 and is not computed.
        """
        if labels_T is None:
            return super().forward(input_, weight, runtime_gather_output)
        rows_M, labels_M = None, labels_T
        if loss_mask_T is not None:
            rows_M = loss_mask_T.nonzero().squeeze(1)
            labels_M = labels_T.index_select(0, rows_M)
        losses_M = TokenLosses.apply(
            input_.squeeze(1),
            self.weight,
            labels_M,
            rows_M,
            self.chunk,
            self.chunk == 0 and torch.is_grad_enabled(),
            self.sequence_parallel,
            self.tp_group,
        )
        if rows_M is None:
            return losses_M
        return losses_M.new_zeros(len(labels_T)).index_copy(0, rows_M, losses_M)


class Decoder(GPTModel):
    """GPTModel whose loss is computed by `OutputLayer`."""

    output_layer: ColumnParallelLinear

    def __init__(self, *arguments: Any, loss_chunk: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.post_process:
            self.output_layer = OutputLayer(self.output_layer, loss_chunk)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """Both Megatron releases call this after the last layer, with these names.

        Hidden states, logits [1, T, V] or, with labels [1, T], losses [1, T].
        """
        if self.post_process and labels is not None:
            mask_T = None if loss_mask is None else loss_mask.squeeze(0)
            losses_T: Tensor = self.output_layer(
                hidden_states, labels_T=labels.squeeze(0), loss_mask_T=mask_T
            )
            return losses_T[None]
        output: Tensor = super()._postprocess(
            hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **named
        )
        return output
