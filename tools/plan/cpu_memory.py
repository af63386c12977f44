"""Bytes that a real Megatron network holds, counted on the CPU, beside what the planner predicts.

Small sizes, one process, Megatron's local layers: what is checked is the counting of weights,
gradients and optimizer state, and of what autograd keeps for the backward pass. The local layers
keep more than Transformer Engine's, which the planner counts; `local_extras` says what, exactly.
"""

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.compose import compose
from conf.schema import Config, ModelConfig, TextConfig, VisionConfig
from tools.plan import activations, memory
from tools.plan.job import Gpu, Job, trained_modules
from tools.plan.workload import Row

TOKENS, DOCUMENTS, TILES = 512, 4, 6
NO_GPU = Gpu(1, None, 1, 1, 1, 1, 1, False)  # bytes do not depend on it


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    parameters: int  # their number


@contextmanager
def one_process(config: Config) -> Iterator[None]:
    """A process group of one rank, on the CPU."""
    from pipeline.distributed import session

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    wanted = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with session(config.parallel, config.stage.seed):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def held(models: list[Any], optimizer: Any) -> Held:
    """Bytes of weights, of DDP's gradient buffers and, after a step, of the optimizer's state."""
    parameters = [p for model in models for p in model.parameters()]
    buffers = [
        buffer.grad_data
        for model in models
        for buffer in [*model.buffers, *model.expert_parallel_buffers]
    ]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states = (tensor for tensor in _state_tensors(optimizer) if tensor.numel() > 1)
    return Held(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients=storage_bytes(iter(buffers)),
        optimizer=storage_bytes(t for t in states if t.untyped_storage().data_ptr() not in own),
        parameters=sum(p.numel() for p in parameters),
    )


def _state_tensors(optimizer: Any) -> Iterator[Tensor]:
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in each.optimizer.param_groups:
            yield from group["params"]  # master weights, or the weights themselves
        for state in each.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Storages that autograd keeps within the block, {address: bytes}; parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def small_model(layers: int = 4, vision_layers: int = 4, words: int = 256) -> ModelConfig:
    """Odd widths, grouped queries, one vision layer that never runs."""
    return ModelConfig(
        name="small",
        vision=VisionConfig(48, 80, vision_layers, 4, image_size=32, patch_size=8),
        text=TextConfig(64, 112, layers, 4, 2, 24, words, 1024),
        image_token_id=words - 1,
        max_tiles=4,
    )


def small_config(model: ModelConfig, *overrides: str) -> Config:
    """Stage 2's recipe for it."""
    return dataclasses.replace(compose(["stage=stage2", *overrides]), model=model)


def job_of(config: Config, targets: float = TOKENS) -> Job:
    """The planner's view of the micro-batch below."""
    row = Row(TOKENS, TOKENS, TOKENS / DOCUMENTS, targets, TILES, TILES)
    return Job(
        model=config.model,
        parallel=config.parallel,
        precision=config.precision,
        trained=trained_modules(config),
        row=row,
        micro_batches=1,
        layers=(config.model.text.layers,),
        gpu=NO_GPU,
    )


def micro_batch(model: ModelConfig) -> dict[str, Any]:
    """A text row of some documents, and tiles that go through the tower."""
    draw = torch.Generator().manual_seed(0)
    length = TOKENS // DOCUMENTS
    side = model.vision.image_size
    return {
        "tokens_T": torch.randint(0, model.text.vocab_size - 1, (TOKENS,), generator=draw),
        "labels_T": torch.randint(0, model.text.vocab_size - 1, (TOKENS,), generator=draw),
        "position_ids_T": torch.arange(TOKENS) % length,
        "cu_seqlens": torch.arange(0, TOKENS + 1, length, dtype=torch.int32),
        "max_seqlen": length,
        "tiles_NCHW": torch.zeros(TILES, 3, side, side, dtype=torch.uint8),
        "image_positions_P": torch.zeros(0, dtype=torch.int64),
        "image_rows_P": torch.zeros(0, dtype=torch.int64),
    }


def build(config: Config) -> tuple[list[Any], Any]:
    """(models, optimizer) as a training job builds them."""
    from pipeline.model import build_training_model
    from pipeline.optimizer import build_optimizer

    models = build_training_model(config)
    return models, build_optimizer(models, config.stage, config.parallel, config.precision)


def measure_held(config: Config) -> Held:
    """Bytes after one step of the optimizer."""
    with one_process(config):
        models, optimizer = build(config)
        loss = models[0](**micro_batch(config.model)).sum()
        models[0].zero_grad_buffer()
        loss.backward()
        models[0].finish_grad_sync()
        optimizer.step()
        return held(models, optimizer)


def measure_checkpoint(config: Config, folder: Path) -> list[Path]:
    """Files of a checkpoint after one step, written below `folder`."""
    from pipeline.checkpoint import TrainingState, save
    from pipeline.optimizer import build_schedule

    with one_process(config):
        models, optimizer = build(config)
        models[0].zero_grad_buffer()
        models[0](**micro_batch(config.model)).sum().backward()
        models[0].finish_grad_sync()
        optimizer.step()
        schedule = build_schedule(optimizer, config.stage, 10)
        chunks = [model.module for model in models]
        state = TrainingState(chunks, optimizer, schedule, {}, "", "", "", step=1)
        return sorted(save(state, folder, keep=2).iterdir())


def measure_saved(config: Config) -> int:
    """Bytes that a forward pass keeps."""
    from pipeline.model import build_training_model

    with one_process(config):
        models = build_training_model(config)
        with saved_bytes(models[0]) as found:
            models[0](**micro_batch(config.model))
        return sum(found.values())


def local_extras(job: Job) -> dict[str, float]:
    """Bytes per token that one local decoder layer keeps beyond what the planner counts.

    Norms: torch's RMSNorm keeps FP32 copies of its input and, for the weight's gradient, of the
    normalised input; the input itself is then not kept. Attention: the values are a view that keeps
    the whole QKV output, each document's output is kept beside the row's, and the row's is copied
    once more for the projection. MLP: SwiGLU is two operations, which keep silu(gate) and a copy.
    """
    text, learns = job.model.text, job.learns_language
    size = job.bytes_per_weight
    width, pair = text.heads * text.head_dim, 2 * text.kv_heads * text.head_dim
    copies = 2 if learns else 1
    return {
        "norms": 2 * (4 * copies * text.hidden_size - size * text.hidden_size),
        "attention": size * ((3 if learns else 2) * width + pair / 2),
        "mlp": size * 2 * text.intermediate_size,
    }


@dataclass(frozen=True)
class Comparison:
    """One prediction beside what was counted, bytes."""

    name: str
    predicted: float
    measured: float
    remark: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def compare() -> list[Comparison]:
    """Everything that can be counted without a GPU."""
    return [*_states(), *_decoder(), _recomputed(), _vision(), _logits()]


def _states() -> list[Comparison]:
    found = []
    for name, overrides in {
        "FP32": ("precision=fp32",),
        "BF16": ("precision=bf16",),
        "BF16, connector only": (
            "precision=bf16",
            "stage.lr.language=0",
            "stage.lr.vision=0",
        ),
    }.items():
        config = small_config(small_model(), *overrides)
        seen, planned = measure_held(config), memory.stage_memory(job_of(config), 0)
        found += [
            Comparison(f"weights, {name}", planned.weights, seen.weights),
            Comparison(f"gradients, {name}", planned.gradients, seen.gradients),
            Comparison(f"optimizer, {name}", planned.optimizer, seen.optimizer),
        ]
    return found


def _decoder() -> list[Comparison]:
    found = []
    for name, overrides in {
        "trained": (),
        "frozen": ("stage.lr.language=0", "stage.lr.vision=0"),
    }.items():
        configs = [
            small_config(small_model(layers), "precision=bf16", *overrides) for layers in (2, 4)
        ]
        less, more = (measure_saved(config) for config in configs)
        job = job_of(configs[0])
        planned = activations.decoder_layer_token(job, fp8=False)
        extras = sum(local_extras(job).values())
        found.append(
            Comparison(
                f"a {name} decoder layer, per token",
                planned + extras,
                (more - less) / 2 / TOKENS,
                f"Transformer Engine's {planned:.0f} and {extras:.0f} of the local layers",
            )
        )
    return found


def _recomputed() -> Comparison:
    configs = [
        small_config(small_model(layers), "precision=bf16", "parallel.recompute=full")
        for layers in (2, 4)
    ]
    less, more = (measure_saved(config) for config in configs)
    return Comparison(
        "a recomputed decoder layer, per token",
        activations.kept_layer(job_of(configs[0]), fp8=False) / TOKENS,
        (more - less) / 2 / TOKENS,
    )


def _vision() -> Comparison:
    configs = [
        small_config(small_model(vision_layers=layers), "precision=bf16") for layers in (3, 5)
    ]
    less, more = (measure_saved(config) for config in configs)
    patches = TILES * configs[0].model.vision.grid ** 2
    return Comparison(
        "a trained vision layer, per patch",
        activations.encoder_layer_patch(job_of(configs[0])) - 2 * activations.STATISTIC,
        (more - less) / 2 / patches,
        "torch keeps the statistics of BF16 norms in BF16",
    )


def _logits() -> Comparison:
    configs = [small_config(small_model(words=words), "precision=bf16") for words in (256, 512)]
    less, more = (measure_saved(config) for config in configs)
    return Comparison(
        "logits kept, per token and word", 2.0, (more - less) / 256 / TOKENS, "loss_chunk=0"
    )
