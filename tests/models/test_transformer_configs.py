"""Configurations that Megatron would misread or stop on with an assertion."""

import pytest
import torch

from conf.schema import ParallelConfig, PrecisionConfig
from conf.schema.errors import ConfigError
from models.pipeline_layout import pipeline_layout
from models.transformer_configs import language_config, vision_config
from tests.models.tiny import tiny_model

FP32 = PrecisionConfig()


def test_vision_is_whole_whatever_the_decoder_does() -> None:
    parallel = ParallelConfig(
        16, tensor=2, pipeline=4, context=2, sequence_parallel=True, recompute="full"
    )
    language = language_config(tiny_model(), parallel, PrecisionConfig(params="bf16"))
    vision = vision_config(tiny_model(), parallel, PrecisionConfig(params="bf16"))
    assert (vision.pipeline_model_parallel_size, vision.context_parallel_size) == (1, 1)
    assert not vision.sequence_parallel and vision.fp8 is None
    assert vision.num_layers == 3  # feature_layer -2 of four
    assert vision.tensor_model_parallel_size == language.tensor_model_parallel_size == 2
    assert vision.recompute_granularity == language.recompute_granularity == "full"
    assert language.params_dtype == vision.params_dtype == language.pipeline_dtype
    assert language.params_dtype == torch.bfloat16
    assert language.calculate_per_token_loss and not language.cross_entropy_loss_fusion


def test_uneven_split_is_a_layout() -> None:
    assert pipeline_layout([1, 2]) == [["embedding", "decoder"], ["decoder", "decoder", "loss"]]
    parallel = ParallelConfig(3, pipeline=3, pipeline_layers=[1, 1, 2])
    layout = language_config(tiny_model(), parallel, FP32).pipeline_model_parallel_layout
    assert [layout.get_num_layers_to_build(pp_rank=rank) for rank in range(3)] == [1, 1, 2]
    assert [layout.get_layer_offset(pp_rank=rank) for rank in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("layers", [[1, 2], [4, 0]])
def test_split_that_does_not_add_up_is_refused(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_layers.*model\.text\.layers=4"):
        language_config(tiny_model(), ParallelConfig(2, pipeline=2, pipeline_layers=layers), FP32)


def test_virtual_stages_are_told_apart() -> None:
    """Two stages that are each other's neighbours on both sides: no batched exchange."""
    config = language_config(tiny_model(), ParallelConfig(2, pipeline=2, virtual_pipeline=2), FP32)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.overlap_p2p_comm and not config.batch_p2p_comm
    assert config.microbatch_group_size_per_vp_stage == 2
    uneven = ParallelConfig(1, pipeline_layers=[4])
    assert language_config(tiny_model(), uneven, FP32).pipeline_model_parallel_layout is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 may run here")
def test_fp8_without_a_gpu_is_refused() -> None:
    precision = PrecisionConfig(params="bf16", fp8_recipe="tensorwise")
    with pytest.raises(ConfigError, match="needs a GPU"):
        language_config(tiny_model(), ParallelConfig(), precision)
