"""How many parameters each rank holds, by part: exactly those that Megatron allocates."""

from dataclasses import dataclass

from conf.schema import TextConfig, VisionConfig
from tools.plan.job import Job


@dataclass(frozen=True)
class Part:
    """Parameters of one kind on one rank."""

    name: str
    module: str  # vision, connector or language; "unused" never trains
    count: int
    matrix: bool  # a linear layer of the decoder, which FP8 may keep in FP8


def decoder_layer(text: TextConfig, tensor: int, gated: bool = True) -> tuple[int, int]:
    """(matrices, vectors) of one decoder layer on one tensor-parallel rank."""
    width, pair = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    mlp = (3 if gated else 2) * text.hidden_size * text.intermediate_size
    return (text.hidden_size * (2 * width + pair) + mlp) // tensor, 2 * text.hidden_size


def encoder_layer(vision: VisionConfig, tensor: int) -> int:
    """Parameters of one SigLIP layer on one tensor-parallel rank; biases that are added after a
    reduction, and norms, are whole on each."""
    hidden, wide = vision.hidden_size, vision.intermediate_size
    split = 4 * hidden * hidden + 3 * hidden + 2 * hidden * wide + wide
    return split // tensor + 2 * hidden + 4 * hidden


def stage_parts(job: Job, stage: int) -> list[Part]:
    """What one rank of a pipeline stage holds."""
    text, vision, tensor = job.model.text, job.model.vision, job.parallel.tensor
    last = job.parallel.pipeline - 1
    matrices, vectors = decoder_layer(text, tensor, job.software.gated)
    layers = job.stage_layers(stage)
    parts = [
        Part("layers", "language", layers * matrices, True),
        Part("norms", "language", layers * vectors, False),
    ]
    table = text.vocab_size * text.hidden_size // tensor
    if stage == 0:
        parts.append(Part("embedding", "language", table, False))
        if job.has_vision:
            parts += _vision_parts(vision, text.hidden_size, tensor, job.model.connector.bias)
    if stage == last:
        parts.append(Part("output", "language", table + text.hidden_size, False))
    return parts


def _vision_parts(vision: VisionConfig, width: int, tensor: int, bias: bool) -> list[Part]:
    hidden, patches = vision.hidden_size, vision.grid**2
    layer = encoder_layer(vision, tensor)
    embedding = hidden * (3 * vision.patch_size**2 + 1) + patches * hidden
    connector = (hidden * width + width * width) // tensor
    if bias:
        connector += width // tensor + width
    return [
        Part("vision", "vision", vision.layers_used * layer + embedding, False),
        Part(
            "unused vision",
            "unused",
            (vision.layers - vision.layers_used) * layer + 2 * hidden,
            False,
        ),
        Part("connector", "connector", connector + width, False),  # and image_newline
    ]


def trained_count(job: Job, stage: int) -> int:
    """Parameters of one rank that have a gradient."""
    return sum(part.count for part in stage_parts(job, stage) if part.module in job.trained)


def model_count(job: Job) -> tuple[int, int]:
    """(all, trained) parameters of the whole model, whatever the layout."""
    text = job.model.text
    matrices, vectors = decoder_layer(text, 1, job.software.gated)
    table = text.vocab_size * text.hidden_size
    parts = [Part("language", "language", text.layers * (matrices + vectors), True)]
    parts.append(Part("tables", "language", 2 * table + text.hidden_size, False))
    if job.has_vision:
        bias = job.model.connector.bias
        parts += _vision_parts(job.model.vision, text.hidden_size, 1, bias)
    total = sum(part.count for part in parts)
    return total, sum(part.count for part in parts if part.module in job.trained)
