"""Make the demo's backbones: a tokenizer, a tiny SigLIP and a tiny Llama, in Hugging Face format.

    python -m tools.make_backbones [out=runs/demo/backbones] [seed=0] [speed=1] [model=tiny ...]

`out/tokenizer`, `out/vision` and `out/language` are complete Hugging Face directories. The two
models train side by side, one process and one thread each. What is finished is not made again;
`speed` divides the number of steps, for quick trials.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conf.compose import compose
from conf.schema.model import ModelConfig
from tools.command import run, split_arguments
from tools.demo.done import BACKBONE_FILES, is_done, settings_digest, write_done

USAGE = "python -m tools.make_backbones [out=runs/demo/backbones] [seed=0] [speed=1] [model=tiny]"
PARTS = ("vision", "language")


def make_tokenizer(out: Path, model: ModelConfig) -> None:
    """Train and save the tokenizer; a second or so, so it is always made."""
    from tools.demo.corpus import corpus
    from tools.demo.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(corpus(), model.image_token_id)
    with _aside(out) as aside:
        save_tokenizer(tokenizer, aside, model)


class _aside:
    """A directory that takes the place of `target` when the block ends well."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self.target, ignore_errors=True)
            self.path.rename(self.target)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def make_part(part: str, out: Path, model: ModelConfig, seed: int, speed: float) -> None:
    """Train one backbone in this process and save it as `out/part`."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    digest = _digest(part, model, seed, speed)  # before training: of the code that trains
    if part == "vision":
        from tools.demo.vision_pretraining import VisionRecipe, pretrain_vision

        eyes = VisionRecipe()
        eyes = replace(eyes, steps=max(1, round(eyes.steps / speed)))
        settings: dict[str, Any] = asdict(eyes)
        trained: Any
        trained, scores = pretrain_vision(model, eyes, seed)
    else:
        from tools.demo.language_pretraining import LanguageRecipe, pretrain_language

        tongue = LanguageRecipe()
        tongue = replace(tongue, steps=max(1, round(tongue.steps / speed)))
        trained, scores = pretrain_language(model, out / "tokenizer", tongue, seed)
        settings = asdict(tongue)
    with _aside(out / part) as aside:
        trained.save_pretrained(aside)
    write_done(_marker(out, part), digest, {"scores": scores, "recipe": settings, "seed": seed})
    print(
        f"{part} " + " ".join(f"{name} {value:.3f}" for name, value in scores.items()), flush=True
    )


def _digest(part: str, model: ModelConfig, seed: int, speed: float) -> str:
    return settings_digest(
        {"part": part, "model": asdict(model), "seed": seed, "speed": float(speed)},
        BACKBONE_FILES[part],
    )


def _marker(out: Path, part: str) -> Path:
    return out / f"{part}.DONE.json"


def make_backbones(out: Path, overrides: list[str], seed: int, speed: float) -> dict[str, float]:
    """Make what is missing; returns the wall seconds of each part made now.

    Raises ValueError when a part fails, with the last lines of its output.
    """
    model = compose(overrides).model
    make_tokenizer(out / "tokenizer", model)
    missing = [
        part
        for part in PARTS
        if not is_done(_marker(out, part), _digest(part, model, seed, speed))
        or not (out / part / "config.json").is_file()
    ]
    for part in PARTS:
        if part not in missing:
            print(f"{out / part} is up to date")
    start = time.monotonic()
    logs = {part: out / f"{part}.log" for part in missing}
    running = {part: _start(part, out, overrides, seed, speed, logs[part]) for part in missing}
    seconds: dict[str, float] = {}
    shown = dict.fromkeys(missing, 0)
    try:
        while running:
            time.sleep(0.2)
            for part, process in list(running.items()):
                status = process.poll()
                shown[part] = _show_new(logs[part], shown[part])
                if status is None:
                    continue
                del running[part]
                seconds[part] = time.monotonic() - start
                if status:
                    lines = logs[part].read_text(encoding="utf-8").splitlines()
                    raise ValueError(
                        f"pre-training of {part} failed with status {status}: "
                        f"{lines[-1] if lines else 'no output'} (see {logs[part]}); run again"
                    )
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return seconds


def _start(
    part: str, out: Path, overrides: list[str], seed: int, speed: float, log: Path
) -> "subprocess.Popen[bytes]":
    words = [f"part={part}", f"out={out}", f"seed={seed}", f"speed={speed}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.make_backbones", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _show_new(log: Path, shown: int) -> int:
    """Print the whole lines that a log has got since byte `shown`; returns where it is now."""
    with log.open("rb") as file:
        file.seek(shown)
        new = file.read()
    end = new.rfind(b"\n") + 1
    sys.stdout.write(new[:end].decode("utf-8", "replace"))
    sys.stdout.flush()
    return shown + end


def main(arguments: list[str]) -> None:
    """Parse `key=value` words; what is not ours overrides the configuration."""
    ours, overrides = split_arguments(arguments, ["out", "seed", "speed", "part"])
    try:
        seed, speed = int(ours.get("seed", "0")), float(ours.get("speed", "1"))
    except ValueError:
        raise ValueError(f"seed= takes an integer and speed= a number; usage: {USAGE}") from None
    if speed <= 0:
        raise ValueError(f"speed={speed:g} is not positive; usage: {USAGE}")
    out = Path(ours.get("out", "runs/demo/backbones"))
    if "part" in ours:
        if ours["part"] not in PARTS:
            raise ValueError(f"part={ours['part']} is neither vision nor language")
        make_part(ours["part"], out, compose(overrides).model, seed, speed)
        return
    seconds = make_backbones(out, overrides, seed, speed)
    if seconds:
        print(json.dumps({part: round(value, 1) for part, value in seconds.items()}))


if __name__ == "__main__":
    sys.exit(run(main))
