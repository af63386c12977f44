"""From configuration to the network of one rank."""

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models.fp8 import require_fp8_layers
from models.llava_next import LlavaNext
from models.megatron_version import check_version, quiet_deprecations
from models.transformer_configs import language_config, vision_config


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
) -> LlavaNext:
    """One part of the network, with initial weights, everything trainable that runs.

    The caller has initialised torch.distributed and `parallel_state` for `parallel` (and, without
    a GPU, called `enable_cpu_backend` before), and has seeded torch: equal seeds give equal
    weights.

    Args:
        pre_process: whether it begins the network (embedding and vision).
        post_process: whether it ends it (final norm and output layer).
        vp_stage: which chunk of this rank it is, with virtual pipeline stages.
        config: the decoder's, where several parts share one; made here otherwise.

    Raises:
        ValueError: the configuration cannot be built (ConfigError names the field), an
            unsupported Megatron-core, a GPU without Transformer Engine, or FP8 that would be
            BF16.
    """
    check_version()
    quiet_deprecations()
    if config is None:
        config = language_config(model, parallel, precision)
    layers = get_num_layers_to_build(
        config, vp_stage, parallel_state.get_pipeline_model_parallel_rank()
    )
    built = LlavaNext(
        model,
        config,
        vision_config(model, parallel, precision),
        decoder_layers=layers,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        loss_chunk=parallel.loss_chunk,
    )
    require_fp8_layers(built.language_model.decoder)
    return built


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> list[LlavaNext]:
    """This rank's parts of the network, in the order of the layers; raises as `build_model`.

    One without virtual pipeline stages, else `parallel.virtual_pipeline`: chunk i of pipeline
    stage s holds the layers of chunk i * parallel.pipeline + s. They share one TransformerConfig,
    from which Megatron's schedules read how to run all of them.
    """
    config = language_config(model, parallel, precision)
    virtual = parallel.virtual_pipeline
    return [
        build_model(
            model,
            parallel,
            precision,
            pre_process=parallel_state.is_pipeline_first_stage(False, stage),
            post_process=parallel_state.is_pipeline_last_stage(False, stage),
            vp_stage=stage,
            config=config,
        )
        for stage in (range(virtual) if virtual > 1 else [None])
    ]
