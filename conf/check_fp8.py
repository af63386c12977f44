"""FP8 is refused where it would silently be BF16, lose precision, or fail in a matrix product.

Megatron-core alone trains in BF16 without a word where Transformer Engine is missing
(`fp8_utils.get_fp8_context` is then an empty context). Asked at submit, where `cluster.fp8`
answers for the nodes, and again on the node.
"""

from collections.abc import Iterator
from math import gcd, lcm

from conf.alignment import fp8_multiple, row_multiple
from conf.hardware import Hardware
from conf.schema import Config

FP8_CAPABILITY = (8, 9)
# Float8BlockScaling needs Hopper (transformer_engine.pytorch.fp8, check_fp8_block_scaling_support).
BLOCKWISE_CAPABILITY = (9, 0)
SWITCH = "use precision=bf16"


def fp8_reasons(config: Config, hardware: Hardware | None) -> Iterator[str]:
    """Why this configuration's FP8 cannot run; nothing without FP8."""
    if config.precision.fp8_recipe is None:
        return
    yield from _machine(config, hardware)
    yield from _layers(config)
    yield from _weights(config)
    yield from _columns(config)
    yield from _rows(config)


def _machine(config: Config, hardware: Hardware | None) -> Iterator[str]:
    recipe = config.precision.fp8_recipe
    if hardware is None:
        if not config.cluster.fp8:
            yield (
                f"precision.fp8_recipe={recipe} needs GPUs with FP8 (compute capability 8.9 or "
                f"newer), and cluster.fp8=false; {SWITCH}, or set cluster.fp8=true if they have it"
            )
        return
    if not hardware.cuda:
        yield f"precision.fp8_recipe={recipe} needs a GPU, and there is none here; {SWITCH}"
        return
    needed = BLOCKWISE_CAPABILITY if recipe == "blockwise" else FP8_CAPABILITY
    if hardware.capability is None or hardware.capability < needed:
        found = ".".join(map(str, hardware.capability or ("unknown",)))
        yield (
            f"precision.fp8_recipe={recipe} needs compute capability {needed[0]}.{needed[1]} or "
            f"newer, and this GPU has {found}; {SWITCH}"
        )
    if not hardware.transformer_engine:
        yield (
            f"precision.fp8_recipe={recipe} needs Transformer Engine, which is not installed; "
            f"install the [gpu] extra, or {SWITCH}"
        )


def _layers(config: Config) -> Iterator[str]:
    """Layers kept in BF16: Megatron counts at most an even stage's layers at either end."""
    precision, layers = config.precision, config.model.text.layers
    most = layers // config.parallel.pipeline
    ends = {
        "precision.fp8_first_layers_bf16": precision.fp8_first_layers_bf16,
        "precision.fp8_last_layers_bf16": precision.fp8_last_layers_bf16,
    }
    for name, count in ends.items():
        if count > most:
            yield (
                f"{name}={count} is more than model.text.layers / parallel.pipeline = {most}, "
                f"which is Megatron's limit; use at most {most}"
            )
    if sum(ends.values()) >= layers:
        yield (
            f"precision.fp8_first_layers_bf16 + precision.fp8_last_layers_bf16 = "
            f"{sum(ends.values())} leave none of {layers} layers in FP8; {SWITCH}"
        )


def _weights(config: Config) -> Iterator[str]:
    """FP8 weights only beside the FP32 ones that they are rounded from."""
    if not config.precision.fp8_params:
        return
    if not config.parallel.distributed_optimizer:
        yield (
            "precision.fp8_params=true needs parallel.distributed_optimizer=true (Megatron's other "
            "optimizers do not take FP8 weights); set it, or precision.fp8_params=false"
        )
    if not config.stage.lr.language > 0:
        yield (
            f"precision.fp8_params=true with stage.lr.language={config.stage.lr.language:g}: a "
            "frozen language model has no FP32 weights beside the FP8 ones, so this stage would "
            "hand over rounded weights; set precision.fp8_params=false"
        )


def _columns(config: Config) -> Iterator[str]:
    text, parallel = config.model.text, config.parallel
    multiple = fp8_multiple(config.precision)
    columns = {
        "model.text.hidden_size": (text.hidden_size, 1),
        "model.text.intermediate_size": (text.intermediate_size, parallel.tensor),
        "model.text.heads*head_dim": (text.heads * text.head_dim, parallel.tensor),
        "model.text.kv_heads*head_dim": (text.kv_heads * text.head_dim, parallel.tensor),
    }
    for name, (size, ranks) in columns.items():
        if size % (multiple * ranks):
            yield (
                f"{name}={size} over {ranks} tensor-parallel ranks is not a multiple of "
                f"{multiple}, which precision.fp8_recipe={config.precision.fp8_recipe} needs; "
                f"lower parallel.tensor, or {SWITCH}"
            )


def _rows(config: Config) -> Iterator[str]:
    stage = config.stage
    rows = stage.micro_batch_size * stage.sequence_length
    multiple = row_multiple(config.parallel, config.precision)
    if rows % multiple:
        step = lcm(multiple // gcd(multiple, stage.micro_batch_size), stage.document_multiple)
        yield (
            f"stage.micro_batch_size * stage.sequence_length = {rows} tokens is not a multiple of "
            f"{multiple}, which precision.fp8_recipe={config.precision.fp8_recipe} needs of this "
            f"parallel layout; use stage.sequence_length={-(-stage.sequence_length // step) * step}"
        )
