"""From configuration to the network of one rank."""

from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
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
) -> LlavaNext:
    """This rank's part of the network, with initial weights, everything trainable that runs.

    The caller has initialised torch.distributed and `parallel_state` for `parallel` (and, without
    a GPU, called `enable_cpu_backend` before), and has seeded torch: equal seeds give equal
    weights.

    Args:
        pre_process: whether this is the first pipeline stage (embedding and vision).
        post_process: whether it is the last (final norm and output layer).

    Raises:
        ValueError: the configuration cannot be built (ConfigError names the field), an
            unsupported Megatron-core, or a GPU without Transformer Engine.
    """
    check_version()
    quiet_deprecations()
    config = language_config(model, parallel, precision)
    layers = get_num_layers_to_build(
        config, vp_stage, parallel_state.get_pipeline_model_parallel_rank()
    )
    return LlavaNext(
        model,
        config,
        vision_config(model, parallel, precision),
        decoder_layers=layers,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )
