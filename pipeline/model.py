"""The model of a training job: built, frozen as the stage says, wrapped for data parallelism."""

from collections.abc import Sequence

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from conf.schema import Config, ParallelConfig, PrecisionConfig
from models.build import build_chunks
from models.fp8 import ddp_settings
from models.layer_specs import fuse_gradient_accumulation
from models.llava_next import LlavaNext
from pipeline.stages import trainable_modules


def build_training_model(config: Config) -> list[DistributedDataParallel]:
    """This rank's part of the network under Megatron's DDP, one for each virtual stage.

    Gradients are summed over micro-batches and replicas and divided once by the global number of
    terms (`calculate_per_token_loss`), so the layout never changes their value.
    """
    chunks = build_chunks(config.model, config.parallel, config.precision)
    for chunk in chunks:
        chunk.freeze(trainable_modules(config.stage.lr))
    return wrap_chunks(chunks, config.parallel, config.precision)


def gather_parameters(models: Sequence[DistributedDataParallel]) -> None:
    """Give every replica the weights of the last step now; all ranks call it.

    With `overlap_param_gather` a replica holds new weights of its own share only, until the next
    forward pass gathers the others'.
    """
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def wrap_chunks(
    chunks: Sequence[LlavaNext], parallel: ParallelConfig, precision: PrecisionConfig
) -> list[DistributedDataParallel]:
    """DDP around each chunk, and what Megatron's schedules call, as its own training sets them.

    With overlap, a pipeline's stages begin their reductions together (`grad_sync_func`), and those
    of an interleaved one their gathers (`param_sync_func`), so that none waits for another's.
    """
    align_gather = parallel.overlap_param_gather and parallel.virtual_pipeline > 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=align_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        **ddp_settings(precision),
    )
    config = chunks[0].config
    # Later chunks' communication has the earlier ones' backward pass to hide behind.
    models = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        fuse_gradient_accumulation(chunk.language_model.decoder)
    several = len(models) > 1
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [model.no_sync for model in models]
        config.no_sync_func = no_sync if several else no_sync[0]  # type: ignore[assignment]
        if parallel.pipeline > 1:
            start = [model.start_grad_sync for model in models]
            config.grad_sync_func = start if several else start[0]  # type: ignore[assignment]
    if align_gather:
        config.param_sync_func = [  # type: ignore[assignment]
            model.start_param_sync for model in models
        ]
    return models
