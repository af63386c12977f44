"""Supervised fine-tuning: mean negative log-likelihood of the answer tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.context_parallel import local_index
from pipeline.batch import DeviceBatch
from pipeline.objectives.base import LossOutput


@dataclass(frozen=True)
class SupervisedObjective:
    """Used by stages 1 and 2."""

    context_rank: int = 0
    context_size: int = 1
    reported = ("loss",)

    def loss(self, batch: DeviceBatch, token_losses_T: Tensor) -> LossOutput:
        """Sum over this rank's target tokens, and how many they are."""
        mask_T = batch.loss_mask_T
        if self.context_size > 1:
            mask_T = mask_T[local_index(batch.cu_seqlens, self.context_size, self.context_rank)]
        total = (token_losses_T.float() * mask_T).sum()
        terms = mask_T.sum()
        # A clone: the schedule scales the returned sum in place.
        return total, terms.to(torch.int), {"terms": terms, "loss": total.detach().clone()}
