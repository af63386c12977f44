"""Parameters by part are those that Megatron allocates, on every rank."""

import dataclasses
from typing import Any

import pytest

from conf.compose import compose
from conf.schema import ParallelConfig
from tests.distributed import megatron, run_ranks
from tools.plan.cpu_memory import job_of, small_config, small_model
from tools.plan.job import Job
from tools.plan.job import job_of as planned
from tools.plan.weights import model_count, stage_parts, trained_count
from tools.plan.workload import row_of


def counted(parallel: ParallelConfig) -> tuple[int, int]:
    """(pipeline rank, parameters) of a real rank."""
    from megatron.core import parallel_state

    from conf.schema import PrecisionConfig
    from models.build import build_chunks

    with megatron(parallel):
        chunks = build_chunks(small_model(), parallel, PrecisionConfig())
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return stage, sum(p.numel() for chunk in chunks for p in chunk.parameters())


def small_job(parallel: ParallelConfig, layers: tuple[int, ...]) -> Job:
    config = dataclasses.replace(small_config(small_model()), parallel=parallel)
    return dataclasses.replace(job_of(config), layers=layers)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({"tensor": 2, "sequence_parallel": True}, (4,)),
        ({"pipeline": 2, "pipeline_layers": [1, 3]}, (1, 3)),
        ({"pipeline": 2, "virtual_pipeline": 2}, (1, 1, 1, 1)),
    ],
)
def test_every_rank_holds_what_is_counted(layout: dict[str, Any], layers: tuple[int, ...]) -> None:
    parallel = ParallelConfig(world_size=2, **layout)
    job = small_job(parallel, layers)
    for stage, parameters in run_ranks(2, counted, parallel):
        assert sum(part.count for part in stage_parts(job, stage)) == parameters


def test_the_real_model_has_as_many_as_its_hugging_face_twin() -> None:
    # transformers' own count on the meta device, image newline and never-run layer included.
    config = compose(["model=amalia_vl_9b", "data=amalia", "cluster=mn5", "stage=stage1"])
    total, trained = model_count(planned(config, row_of(config)))
    assert total == 9_587_370_224
    # linear_1, linear_2, their biases and the newline
    assert trained == 1152 * 4096 + 4096 * 4096 + 3 * 4096


def test_stages_add_up_to_the_model() -> None:
    job = small_job(ParallelConfig(world_size=4, pipeline=4), (1, 1, 1, 1))
    held = sum(part.count for stage in range(4) for part in stage_parts(job, stage))
    assert held == model_count(job)[0]
    assert sum(trained_count(job, stage) for stage in range(4)) == model_count(job)[1]
