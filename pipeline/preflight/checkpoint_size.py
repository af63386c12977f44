"""How large a checkpoint becomes, from the configuration alone."""

from conf.schema import Config
from conf.schema.model import ModelConfig

_PARAMETER_BYTES = {"fp32": 4, "bf16": 2}
_OPTIMIZER_BYTES = 12  # float32 master weight and AdamW's two moments
_SPARE = 1.02  # indices, padding, random-number states
_SMALL_FILES = 8  # manifest, indices, metadata


def parameters(model: ModelConfig) -> dict[str, int]:
    """Number of parameters of each module: vision, connector, language."""
    vision, text = model.vision, model.text
    side, inner = vision.hidden_size, vision.intermediate_size
    encoder_layer = 4 * (side * side + side) + 2 * side * inner + inner + side + 4 * side
    embeddings = (3 * vision.patch_size**2 + 1) * side + vision.grid**2 * side
    hidden = text.hidden_size
    attention = 2 * hidden * text.head_dim * (text.heads + text.kv_heads)
    decoder_layer = attention + 3 * hidden * text.intermediate_size + 2 * hidden
    biases = 2 * hidden if model.connector.bias else 0
    return {
        "vision": embeddings + vision.layers * encoder_layer + 2 * side,
        # two linear layers and the image_newline vector
        "connector": side * hidden + hidden * hidden + biases + hidden,
        "language": 2 * text.vocab_size * hidden + text.layers * decoder_layer + hidden,
    }


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: all weights, and optimizer state of the modules in training."""
    rates = config.stage.lr
    total = 0
    for module, count in parameters(config.model).items():
        trained = getattr(rates, module) > 0
        total += count * _PARAMETER_BYTES[config.precision.params]
        total += count * _OPTIMIZER_BYTES * trained
    return int(total * _SPARE)


def checkpoint_files(config: Config) -> int:
    """Files of one checkpoint: two writers a rank, and what rank 0 adds."""
    return 2 * config.parallel.world_size + _SMALL_FILES
