"""What each rank does in the parity tests: build, load, run through Megatron's schedule."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models.build import build_chunks
from models.context_parallel import full_order, local_index
from models.llava_next import LlavaNext
from pipeline.model import wrap_chunks
from tests.distributed import megatron
from tests.models.shards import gather_shards, load_shards

NOT_INPUTS = ("loss_mask_T",)


def load_chunks(
    model: ModelConfig, parallel: ParallelConfig, state: dict[str, Tensor]
) -> list[LlavaNext]:
    """This rank's chunks of the network with the given whole weights."""
    chunks = build_chunks(model, parallel, PrecisionConfig())
    for chunk in chunks:
        load_shards(chunk, state)
        chunk.freeze({"vision", "connector", "language"})
    return chunks


def build_loaded(
    model: ModelConfig, parallel: ParallelConfig, state: dict[str, Tensor]
) -> LlavaNext:
    """As `load_chunks`, where this rank has one."""
    (chunk,) = load_chunks(model, parallel, state)
    return chunk


def _inputs(batch: dict[str, Any], labels: bool) -> dict[str, Any]:
    without = () if labels else (*NOT_INPUTS, "labels_T")
    return {name: value for name, value in batch.items() if name not in without}


def logits_worker(
    model: ModelConfig, parallel: ParallelConfig, state: dict[str, Tensor], batch: dict[str, Any]
) -> Tensor | None:
    """Logits of the whole row [T, V], on every rank of the last stage."""
    with megatron(parallel):
        chunks = load_chunks(model, parallel, state)

        def forward(batches: Iterator[dict], module: LlavaNext) -> tuple[Tensor, Any]:
            output = module(**_inputs(next(batches), labels=False))
            return output, lambda logits, non_loss_data: logits

        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([batch] * parallel.pipeline) for _ in chunks],
            model=chunks,
            num_microbatches=parallel.pipeline,  # as many as an interleaved schedule wants
            seq_length=len(batch["tokens_T"]),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not reports:
            return None
        logits = _cat_over(reports[0], parallel_state.get_tensor_model_parallel_group(), dim=1)
        if parallel.context > 1:
            shares = _cat_over(logits, parallel_state.get_context_parallel_group(), dim=0)
            logits = shares[full_order(batch["cu_seqlens"], parallel.context)]
        return logits


def _cat_over(tensor: Tensor, group: Any, dim: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


def gradients_worker(
    model: ModelConfig,
    parallel: ParallelConfig,
    state: dict[str, Tensor],
    micro_batches: Sequence[dict[str, Any]],
    trainable: Sequence[str] = ("vision", "connector", "language"),
) -> tuple[float | None, dict[str, Tensor]]:
    """Mean loss and whole gradients (of this stage) of one global batch.

    Data-parallel replica r of R takes micro-batches r::R.
    """
    with megatron(parallel):
        chunks = load_chunks(model, parallel, state)
        for chunk in chunks:
            chunk.freeze(trainable)
        wrapped = wrap_chunks(chunks, parallel, PrecisionConfig())
        replica = parallel_state.get_data_parallel_rank()
        mine = list(micro_batches)[replica :: parallel_state.get_data_parallel_world_size()]

        def forward(batches: Iterator[dict], module: Any) -> tuple[Tensor, Any]:
            batch = next(batches)

            def loss(token_losses_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                mask_T = batch["loss_mask_T"]
                if parallel.context > 1:
                    rank = parallel_state.get_context_parallel_rank()
                    mask_T = mask_T[local_index(batch["cu_seqlens"], parallel.context, rank)]
                total = (token_losses_T * mask_T).sum()
                terms = mask_T.sum()
                return total, terms.to(torch.int), torch.stack([total.detach(), terms]).double()

            return module(**_inputs(batch, labels=True)), loss

        for chunk in wrapped:
            chunk.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(mine) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(mine),
            seq_length=len(mine[0]["tokens_T"]),
            micro_batch_size=1,
            forward_only=False,
        )
        loss = None
        if reports:
            sums = torch.stack(reports).sum(0)
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(True))
            loss = float(sums[0] / sums[1])
        gradients: dict[str, Tensor] = {}
        for chunk in chunks:
            gradients |= gather_shards(chunk, "main_grad")
        return loss, gradients
