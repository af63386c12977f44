"""Memory and time of a real network on this GPU beside the planner's prediction, at real width.

    python -m tools.plan.measured [gpu=h200] [layers=12] [sequence=8192] [tiles=13] [KEY=VALUE]

One process, random weights and tokens, `layers` decoder layers of model=amalia_vl_9b: bytes after
building, after the optimizer's first step and at the peak of a step, and the seconds of a step of
one micro-batch. `gpu` names the data sheet (h100, h200, a100). Without a GPU bytes are still
counted, of what torch allocates (model=tiny), but nothing is timed. Not run on a GPU yet.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from tools.command import run, split_arguments
from tools.plan import memory
from tools.plan.cpu_memory import Held, build, held, one_process
from tools.plan.job import Gpu, Job, Software, trained_modules
from tools.plan.published_rows import A100, DGX_H100, H200
from tools.plan.step import step
from tools.plan.workload import Row

GPUS = {"h100": DGX_H100, "h200": H200, "a100": A100}
WARMUP, STEPS = 3, 10


@dataclass(frozen=True)
class Measured:
    """One network on one device."""

    held: Held
    built: int  # bytes allocated after building; 0 without a GPU
    peak: int  # and at the most in a step
    seconds: float | None  # of a step of one micro-batch; None without a GPU


def main(arguments: list[str]) -> None:
    """Build, run and print both sides."""
    names = ("gpu", "layers", "sequence", "tiles")
    ours, overrides = split_arguments(arguments, names)
    kind = ours.get("gpu", "h200")
    if kind not in GPUS:
        raise ConfigError(f"gpu={kind} is none of {', '.join(GPUS)}")
    model = "amalia_vl_9b" if torch.cuda.is_available() else "tiny"
    start = [f"model={model}", "stage=stage2", "precision=bf16", "data=amalia"]
    config = compose([*start, *overrides])
    text = config.model.text
    text = dataclasses.replace(text, layers=int(ours.get("layers", min(text.layers, 12))))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    length = int(ours.get("sequence", 8192 if torch.cuda.is_available() else 256))
    tiles = int(ours.get("tiles", 13 if torch.cuda.is_available() else 2))
    job = job_of(config, GPUS[kind], length, tiles)
    for line in table(job, measure(config, length, tiles)):
        print(line)


def job_of(config: Config, gpu: Gpu, length: int, tiles: int) -> Job:
    """The planner's view of the micro-batch below: one document, every token with a target."""
    return Job(
        model=config.model,
        parallel=config.parallel,
        precision=config.precision,
        trained=trained_modules(config),
        row=Row(length, length, length, length, tiles, tiles),
        micro_batches=1,
        layers=(config.model.text.layers,),
        gpu=gpu,
        software=Software(flash=3 if gpu.hopper else 2),
    )


def measure(config: Config, length: int, tiles: int) -> Measured:
    """Train a few steps on one micro-batch."""
    on_gpu = torch.cuda.is_available()
    with one_process(config):
        models, optimizer = build(config)
        device = next(models[0].parameters()).device
        built = torch.cuda.memory_allocated() if on_gpu else 0
        batch = _batch(config, length, tiles, device)
        for _ in range(WARMUP if on_gpu else 1):
            _step(models, optimizer, batch)
        seconds, peak = None, 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            for _ in range(STEPS):
                _step(models, optimizer, batch)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - before) / STEPS
            peak = torch.cuda.max_memory_allocated()
        return Measured(held(models, optimizer), built, peak, seconds)


def _step(models: list[Any], optimizer: Any, batch: dict[str, Any]) -> None:
    optimizer.zero_grad()
    for model in models:
        model.zero_grad_buffer()
    models[0](**batch).mean().backward()
    for model in models:
        model.finish_grad_sync()
    optimizer.step()


def _batch(config: Config, length: int, tiles: int, device: torch.device) -> dict[str, Any]:
    """One document, whose first tokens are the tiles' features."""
    vocabulary, vision = config.model.text.vocab_size, config.model.vision
    images = min(length // 2, tiles * vision.grid**2)
    places = torch.arange(images, device=device)
    tokens = torch.randint(0, vocabulary - 1, (length,), device=device)
    side = vision.image_size
    pixels = torch.randint(0, 256, (tiles, 3, side, side), dtype=torch.uint8, device=device)
    return {
        "tokens_T": tokens,
        "labels_T": tokens.roll(-1),
        "position_ids_T": torch.arange(length, device=device),
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32, device=device),
        "max_seqlen": length,
        "tiles_NCHW": pixels,
        "image_positions_P": places,
        "image_rows_P": places,
    }


def table(job: Job, seen: Measured) -> list[str]:
    """Predicted and measured, MiB and milliseconds."""
    planned, mib = memory.stage_memory(job, 0), 1 / 2**20
    allocated = planned.total - planned.reserve - planned.communication
    rows = [
        ("weights", planned.weights * mib, seen.held.weights * mib),
        ("gradients", planned.gradients * mib, seen.held.gradients * mib),
        ("optimizer", planned.optimizer * mib, seen.held.optimizer * mib),
    ]
    if seen.seconds is not None:
        rows += [
            ("allocated when built", (planned.weights + planned.gradients) * mib, seen.built * mib),
            ("allocated at the peak", allocated * mib, seen.peak * mib),
            ("milliseconds of a step", 1e3 * step(job).seconds, 1e3 * seen.seconds),
        ]
    lines = [f"{'':24} {'predicted':>12} {'measured':>12} {'error':>8}"]
    for name, predicted, measured in rows:
        error = predicted / measured - 1 if measured else float("nan")
        lines.append(f"{name:24} {predicted:12,.1f} {measured:12,.1f} {error:+8.1%}")
    return lines


if __name__ == "__main__":
    sys.exit(run(main))
