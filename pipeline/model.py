"""The model of a training job: built, frozen as the stage says, wrapped for data parallelism."""

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from conf.schema import Config
from models.build import build_model
from models.llava_next import LlavaNext
from pipeline.stages import trainable_modules


def build_training_model(config: Config) -> DistributedDataParallel:
    """This rank's part of the network under Megatron's DDP.

    Gradients are summed over micro-batches and replicas and divided once by the global number of
    terms (`calculate_per_token_loss`), so the layout never changes their value.
    """
    model: LlavaNext = build_model(
        config.model,
        config.parallel,
        config.precision,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
    model.freeze(trainable_modules(config.stage.lr))
    parallel = config.parallel
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.precision.grad_reduce_in_fp32,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
    if parallel.overlap_param_gather:
        model.config.param_sync_func = wrapped.start_param_sync
    return wrapped
