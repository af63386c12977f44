"""What each part builds: real shapes for the GPU, tiny ones for a trial on a CPU."""

from dataclasses import dataclass, replace

from conf.schema import (
    ClusterConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TextConfig,
    VisionConfig,
)
from tools.benchmarks.synthetic import Mixture

FP8_RECIPES = ("tensorwise", "blockwise", "delayed")


@dataclass(frozen=True)
class Shapes:
    """Sizes of every part."""

    parity: ModelConfig  # the real layers, few of them
    parity_tokens: int
    curve: ModelConfig  # 1-2 B, with the geometry and vocabulary of the demo's data
    curve_steps: int
    resume: ModelConfig
    speed: ModelConfig  # the real layers, as many as fit with their optimizer
    lengths: tuple[int, ...]
    pairs_length: int
    mixture: Mixture
    loss_chunk: int
    warm_up: int
    timed: int


def _real(text_layers: int, vision_layers: int) -> ModelConfig:
    """conf/model/amalia_vl_9b.yaml with fewer layers; test_shapes compares them."""
    return ModelConfig(
        name="amalia_vl_9b",
        vision=VisionConfig(1152, 4304, vision_layers, 16, image_size=384, patch_size=16),
        text=TextConfig(4096, 12288, text_layers, 32, 8, 128, 128064, 32768),
        image_token_id=128000,
        max_tiles=12,
    )


def real(layers: int) -> Shapes:
    """For one GPU of 141 GB; `layers` decoder layers in the part that measures speed."""
    demo_vision = VisionConfig(1152, 4304, 12, 16, image_size=32, patch_size=8)
    return Shapes(
        parity=_real(2, 4),
        parity_tokens=2048,
        curve=ModelConfig(
            name="demo_1.5b",
            vision=demo_vision,
            text=TextConfig(2048, 8192, 24, 32, 8, 64, 832, 2048),
            image_token_id=768,
            max_tiles=4,
        ),
        curve_steps=200,
        resume=ModelConfig(
            name="resume",
            vision=replace(demo_vision, layers=3),
            text=TextConfig(1024, 4096, 4, 16, 8, 64, 832, 2048),
            image_token_id=768,
            max_tiles=4,
        ),
        speed=_real(layers, 27),
        lengths=(8192, 16384),
        pairs_length=8192,
        # 3 x 2 and 2 x 2 tiles of 384 px and smaller ones: about half of a row's tokens.
        mixture=Mixture(images=((1152, 768), (700, 700), (384, 384), (1152, 768), (700, 700))),
        loss_chunk=2048,
        warm_up=3,
        timed=6,
    )


def tiny() -> Shapes:
    """The same script in seconds on a CPU."""
    vision = VisionConfig(32, 48, 3, 4, image_size=32, patch_size=8)
    text = TextConfig(64, 112, 2, 4, 2, 16, 832, 512)
    model = ModelConfig("tiny", vision, text, image_token_id=768, max_tiles=4)
    return Shapes(
        parity=model,
        parity_tokens=192,
        curve=model,
        curve_steps=6,
        resume=model,
        speed=model,
        lengths=(128, 256),
        pairs_length=128,
        mixture=Mixture(images=((32, 32), (64, 40)), text=12, documents=(30, 12)),
        loss_chunk=64,
        warm_up=1,
        timed=2,
    )


def precisions(cuda: bool) -> dict[str, PrecisionConfig]:
    """Rows of the tables by name; the first is what the others are compared with."""
    if not cuda:
        return {"fp32": PrecisionConfig("fp32"), "bf16": PrecisionConfig("bf16")}
    found = {"bf16": PrecisionConfig("bf16")}
    return found | {name: PrecisionConfig("bf16", fp8_recipe=name) for name in FP8_RECIPES}


def speed_parallel(shapes: Shapes, cuda: bool) -> ParallelConfig:
    """As a real job on one GPU."""
    return ParallelConfig(
        distributed_optimizer=True,
        optimizer_states="bf16" if cuda else "fp32",
        loss_chunk=shapes.loss_chunk,
    )


def h200() -> ClusterConfig:
    """What the planner must know of the GPU (NVIDIA's data sheet of the H200 SXM)."""
    return ClusterConfig(
        name="h200",
        gpus_per_node=1,
        fp8=True,
        gpu_tflops=989.0,
        gpu_fp8_tflops=1979.0,
        gpu_bandwidth=4800.0,
        node_bandwidth=450.0,
        network_bandwidth=50.0,
        gpu_memory_gb=131.0,
    )
