"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), sigmoid loss.

Log-probabilities are sums over the answer tokens, as in TRL's DPOTrainer. The reference model's
are looked up, not computed: `pipeline.reference` stores them before the first step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context_parallel import local_index
from pipeline.batch import DeviceBatch
from pipeline.objectives.base import LossOutput

# (data set number, manifest row) -> log-probability of the (chosen, rejected) answer
ReferenceLogProbs = Mapping[tuple[int, int], tuple[float, float]]


class _SumOverContextRanks(torch.autograd.Function):
    """All-reduce whose backward is the identity: every rank computes the same loss from the
    sum, and each differentiates only its own share; the gradient all-reduce adds them up."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        from megatron.core import parallel_state

        value = value.clone()
        torch.distributed.all_reduce(value, group=parallel_state.get_context_parallel_group())
        return value

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def document_log_probs(
    batch: DeviceBatch, token_losses_T: Tensor, context_rank: int, context_size: int
) -> Tensor:
    """Summed log-probability of each document's target tokens, float32 [documents]."""
    mask_T, lengths_D = batch.loss_mask_T, batch.cu_seqlens.diff()
    if context_size > 1:
        mask_T = mask_T[local_index(batch.cu_seqlens, context_size, context_rank)]
        lengths_D = lengths_D // context_size
    log_probs_T = -token_losses_T.float().reshape(-1) * mask_T
    log_probs_D = torch.segment_reduce(log_probs_T, "sum", lengths=lengths_D.long())
    if context_size > 1:
        log_probs_D = _SumOverContextRanks.apply(log_probs_D)
    return log_probs_D


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each pair and the two implicit rewards, each [pairs].

    loss = -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    """
    chosen_reward_B = beta * (chosen_B - ref_chosen_B)
    rejected_reward_B = beta * (rejected_B - ref_rejected_B)
    loss_B = -F.logsigmoid(chosen_reward_B - rejected_reward_B)
    return loss_B, chosen_reward_B, rejected_reward_B


@dataclass(frozen=True)
class PreferenceObjective:
    """Used by stage 3; one term per preference pair."""

    beta: float
    reference: ReferenceLogProbs
    context_rank: int = 0
    context_size: int = 1
    reported = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")

    def loss(self, batch: DeviceBatch, token_losses_T: Tensor) -> LossOutput:
        """Sum over this micro-batch's pairs. Only context rank 0 counts and reports them."""
        log_probs_D = document_log_probs(
            batch, token_losses_T, self.context_rank, self.context_size
        )
        keys = [(int(source), int(row)) for source, row in batch.sample_ids.tolist()]
        reference_B2 = torch.tensor(
            [self.reference[key] for key in keys], dtype=torch.float32, device=log_probs_D.device
        ).reshape(-1, 2)
        pairs_B2 = batch.pairs
        # A pair whose bytes were bad has no target token left and must not count.
        targets_D = torch.segment_reduce(
            batch.loss_mask_T, "sum", lengths=batch.cu_seqlens.diff().long()
        )
        keep_B = (targets_D[pairs_B2] > 0).all(dim=1)
        chosen_B, rejected_B = log_probs_D[pairs_B2[:, 0]], log_probs_D[pairs_B2[:, 1]]
        loss_B, chosen_reward_B, rejected_reward_B = dpo_loss(
            chosen_B, rejected_B, reference_B2[:, 0], reference_B2[:, 1], self.beta
        )
        total = (loss_B * keep_B).sum()
        counts = self.context_rank == 0
        weight_B = keep_B.float() * (1.0 if counts else 0.0)
        margin_B = (chosen_reward_B - rejected_reward_B).detach()
        terms = weight_B.sum()
        report = {
            "terms": terms,
            "loss": (loss_B.detach() * weight_B).sum(),
            "accuracy": ((margin_B > 0) * weight_B).sum(),
            "margin": (margin_B * weight_B).sum(),
            "chosen_reward": (chosen_reward_B.detach() * weight_B).sum(),
            "rejected_reward": (rejected_reward_B.detach() * weight_B).sum(),
        }
        return total, terms.to(torch.int), report


@dataclass(frozen=True)
class ReferenceObjective:
    """Collects log-probabilities instead of a loss, in a pass without gradients."""

    context_rank: int = 0
    context_size: int = 1
    reported: tuple[str, ...] = ()

    def loss(self, batch: DeviceBatch, token_losses_T: Tensor) -> LossOutput:
        """Report: `ids` int64 [pairs, 2] and `log_probs` float32 [pairs, 2]."""
        log_probs_D = document_log_probs(
            batch, token_losses_T, self.context_rank, self.context_size
        )
        count = torch.tensor(batch.pairs.shape[0], dtype=torch.int, device=log_probs_D.device)
        report = {"ids": batch.sample_ids, "log_probs": log_probs_D[batch.pairs]}
        return log_probs_D.sum(), count, report
