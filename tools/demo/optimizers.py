"""Optimizers of the demo's pre-training: Muon for matrices inside blocks, AdamW for the rest.

Muon (Jordan et al. 2024, as `torch.optim.Muon`) took about half the steps of AdamW here; tables
and output heads want a far larger rate than matrices do.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tools.demo.progress import cosine


class Optimizers:
    """Both optimizers under one cosine schedule.

    Args:
        named: every trained parameter with its name.
        tables: parts of names of the parameters that are tables or heads, not inner matrices.
        rates: peak learning rates (Muon's, AdamW's).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        tables: tuple[str, ...],
        rates: tuple[float, float],
        weight_decay: float,
        steps: int,
        warmup: int,
        floor: float,
    ) -> None:
        everything = list(named)
        inner = [
            parameter
            for name, parameter in everything
            if parameter.ndim == 2 and not any(part in name for part in tables)
        ]
        chosen = {id(parameter) for parameter in inner}
        rest = [parameter for _, parameter in everything if id(parameter) not in chosen]
        self.parameters: list[Tensor] = [*inner, *rest]
        self._rates, self._schedule = rates, (steps, warmup, floor)
        self._step = 0
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                inner,
                lr=rates[0],
                momentum=0.95,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                rest, lr=rates[1], betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
            ),
        ]

    def step(self, loss: Tensor) -> None:
        """Backward pass, clipping to norm 1, one step of both."""
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(self._step, *self._schedule)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._step += 1
