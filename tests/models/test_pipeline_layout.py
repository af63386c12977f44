"""The split of the decoder over pipeline stages."""

import itertools

import pytest

from conf.compose import compose
from conf.schema import ModelConfig, ParallelConfig
from conf.schema.errors import ConfigError
from models.pipeline_layout import balanced_split, chunk_layers, split_for


def stage_loads(split: list[int], first: float, last: float, pipeline: int) -> list[float]:
    loads = [float(count) for count in split]
    loads[0] += first
    loads[-1] += last
    return [sum(loads[stage::pipeline]) for stage in range(pipeline)]


def every_split(layers: int, chunks: int) -> list[list[int]]:
    """All ways to give `layers` layers to `chunks` chunks, at least one each."""
    cuts = itertools.combinations(range(1, layers), chunks - 1)
    return [[b - a for a, b in itertools.pairwise((0, *cut, layers))] for cut in cuts]


@pytest.mark.parametrize("first", [0.0, 0.4, 1.0, 2.6, 7.0])
@pytest.mark.parametrize("last", [0.0, 0.9, 3.1])
@pytest.mark.parametrize(("layers", "pipeline", "virtual"), [(9, 2, 1), (11, 4, 1), (10, 2, 2)])
def test_no_split_has_a_lower_maximum(
    layers: int, pipeline: int, virtual: int, first: float, last: float
) -> None:
    """Against all splits there are."""
    split = balanced_split(layers, first, last, pipeline, virtual)
    assert sum(split) == layers and min(split) >= 1 and len(split) == pipeline * virtual
    best = min(
        max(stage_loads(other, first, last, pipeline))
        for other in every_split(layers, pipeline * virtual)
    )
    assert max(stage_loads(split, first, last, pipeline)) == pytest.approx(best)


def test_even_stays_even() -> None:
    assert balanced_split(42, 0, 0, 2) == [21, 21]
    assert balanced_split(8, 0, 0, 2, 2) == [2, 2, 2, 2]
    assert balanced_split(5, 0, 0, 2) == [2, 3]  # the later stage holds fewer micro-batches


def test_fewer_layers_than_chunks() -> None:
    with pytest.raises(ConfigError, match=r"layers=3 are fewer than .*= 4 chunks"):
        balanced_split(3, 0, 0, 2, 2)


@pytest.fixture(scope="module")
def real() -> ModelConfig:
    return compose(["model=amalia_vl_9b", "data=amalia"]).model


def test_what_is_given_is_taken(real: ModelConfig) -> None:
    assert chunk_layers(real, ParallelConfig(2, pipeline=2)) == [21, 21]
    given = ParallelConfig(2, pipeline=2, pipeline_layers=[19, 23])
    assert chunk_layers(real, given) == [19, 23]


def test_42_layers_on_4_stages(real: ModelConfig) -> None:
    """What is not a layer costs the first and the last stage one each, roughly."""
    assert chunk_layers(real, ParallelConfig(4, pipeline=4)) == [10, 11, 11, 10]


def test_more_tiles_leave_the_first_stage_fewer_layers(real: ModelConfig) -> None:
    parallel = ParallelConfig(4, pipeline=4)
    text = split_for(real, parallel, [16384], 8192, 0)
    images = split_for(real, parallel, [16384], 8192, 60)
    assert images[0] < text[0] and text[-1] < text[1]


def test_a_frozen_tower_costs_its_forward_pass_only(real: ModelConfig) -> None:
    parallel = ParallelConfig(4, pipeline=4)
    frozen = split_for(real, parallel, [16384], 8192, 60, {"language", "connector"})
    assert frozen[0] > split_for(real, parallel, [16384], 8192, 60)[0]
