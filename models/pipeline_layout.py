"""How many decoder layers each chunk of the pipeline gets, and how Megatron is told.

Evenly where that works out: Megatron's own split. Otherwise, or where asked, so that the most
loaded pipeline stage has least to do, counting what is not a decoder layer: the vision tower and
the connector stand on the first stage, the projection to the vocabulary on the last. No torch here.
"""

from collections.abc import Collection, Iterable
from typing import Any

from conf.schema import ModelConfig, ParallelConfig
from conf.schema.errors import ConfigError
from models.anyres import AnyresGeometry
from models.flops import MODULES, forward_flops, training_flops


def balanced_split(
    layers: int, first: float, last: float, pipeline: int, virtual: int = 1
) -> list[int]:
    """Layers of each chunk, at least one each, with the least maximum load of a stage.

    Args:
        layers: decoder layers.
        first: what stands before the first layer, in costs of one layer.
        last: what stands after the last layer, in costs of one layer.
        pipeline: stages; chunk i is on stage i % pipeline.
        virtual: chunks of each stage.

    Returns:
        `pipeline * virtual` numbers in the order of the layers. Between equal loads the later
        stage gets the layer: it holds fewer micro-batches' activations (1F1B).

    Raises:
        ConfigError: fewer layers than chunks.
    """
    chunks = pipeline * virtual
    if layers < chunks:
        raise ConfigError(
            f"model.text.layers={layers} are fewer than parallel.pipeline={pipeline} * "
            f"parallel.virtual_pipeline={virtual} = {chunks} chunks; lower one of them"
        )
    split = [1] * chunks
    extra = [0.0] * chunks
    extra[0] += first
    extra[-1] += last
    # All layers cost the same, so that giving each to the least loaded stage is optimal.
    for _ in range(layers - chunks):
        loads = [split[i] + extra[i] for i in range(chunks)]
        stage = min(range(pipeline), key=lambda s: (sum(loads[s::pipeline]), -s))
        chunk = min(range(stage, chunks, pipeline), key=lambda i: (loads[i], -i))
        split[chunk] += 1
    return split


def split_for(
    model: ModelConfig,
    parallel: ParallelConfig,
    documents: Iterable[int],
    targets: int,
    tiles: int,
    trained: Collection[str] = MODULES,
) -> list[int]:
    """The balanced split for micro-batches like this one.

    Args:
        documents: tokens of each document.
        targets: tokens with a loss.
        tiles: image tiles.
        trained: modules that learn; frozen ones have no backward pass, or half of it.

    Raises:
        ConfigError: fewer layers than chunks.
    """
    flops = training_flops(forward_flops(model, documents, targets, tiles), trained)
    layer = flops.language / model.text.layers
    return balanced_split(
        model.text.layers,
        (flops.vision + flops.connector) / layer,
        flops.vocabulary / layer,
        parallel.pipeline,
        parallel.virtual_pipeline,
    )


def chunk_layers(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Decoder layers of each chunk, `parallel.pipeline * parallel.virtual_pipeline` numbers.

    `parallel.pipeline_layers` where it is given; else as many in each; else, where the layers do
    not divide, balanced for a document of one largest image and as many tokens of text, half of
    them answers, with everything trained.

    Raises:
        ConfigError: `parallel.pipeline_layers` does not add up, or fewer layers than chunks.
    """
    layers, chunks = model.text.layers, parallel.pipeline * parallel.virtual_pipeline
    given = parallel.pipeline_layers
    if given is not None:
        if len(given) != chunks or sum(given) != layers or min(given) < 1:
            raise ConfigError(
                f"parallel.pipeline_layers={list(given)} must be {chunks} positive numbers that "
                f"add up to model.text.layers={layers}"
            )
        return list(given)
    if layers % chunks == 0:
        return [layers // chunks] * chunks
    geometry = AnyresGeometry.from_model(model)
    image = geometry.max_tokens()
    tiles = 1 + max(h * w // geometry.tile**2 for h, w in geometry.pinpoints)
    return split_for(model, parallel, [2 * image], image // 2, tiles)


def pipeline_layout(layers: list[int]) -> list[list[str]]:
    """Megatron's `pipeline_model_parallel_layout` for the decoder layers of each chunk.

    Chunk i is on stage i % pipeline: first every stage's first chunk, then every stage's second.
    """
    layout = [["decoder"] * count for count in layers]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def pipeline_settings(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Fields of the decoder's `TransformerConfig` that say how it is split and scheduled.

    Raises:
        ConfigError: the split does not add up.
    """
    if parallel.pipeline == 1:
        return {}
    settings: dict[str, Any] = {}
    layers = chunk_layers(model, parallel)
    if len(set(layers)) > 1:
        settings["pipeline_model_parallel_layout"] = pipeline_layout(layers)
    if parallel.virtual_pipeline > 1:
        settings["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline
        # Two stages that are each other's next and previous exchange several tensors at once,
        # which one batch of sends and receives cannot tell apart (Megatron's arguments.py).
        settings["overlap_p2p_comm"] = True
        settings["batch_p2p_comm"] = False
    return settings
