"""A stage's checkpoint -> a complete Hugging Face directory.

    python -m tools.hf_export stage=runs/NAME/stage2 out=DIR [tokenizer=DIR] [dtype=bfloat16]

The directory loads with `AutoProcessor` and `AutoModelForImageTextToText` of transformers 4.57.6
(`LlavaNextForConditionalGeneration`). It is written aside and renamed into place. The tokenizer is
the one of the run's `import/` unless named; its digest must be the one the stage was trained with.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from conf.compose import compose, from_mapping, load, to_mapping
from conf.schema import ModelConfig, PrecisionConfig
from data_shards.chat import ChatTokenizer
from data_shards.durable import sync_directory
from models.hf_state import to_hf
from pipeline.handoff import Done, read_done
from tools.command import required, run, split_arguments
from tools.hf_config import TRANSFORMERS, llava_config
from tools.processor_files import special_ids, write_processor, write_tokenizer
from tools.safetensors_files import SHARD_BYTES, write_weights
from tools.single_process import parameters, whole_model

USAGE = "python -m tools.hf_export stage=runs/NAME/stage2 out=DIR [tokenizer=DIR] [dtype=...]"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
language: [pt, en]
---
# {name}, after {stage}

`LlavaNextForConditionalGeneration`, {parameters:,} parameters in {dtype}, written by AMALIA-VL's
`tools.hf_export` from step {step} of {stage} in the layout of transformers {transformers}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("DIRECTORY")
model = AutoModelForImageTextToText.from_pretrained("DIRECTORY", dtype="auto")
content = [{{"type": "image", "url": "picture.png"}}, {{"type": "text", "text": "O que se vê?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Tiles of {tile} px, at most {tokens} image tokens a picture. Trained: {trained}; frozen: {frozen}.
"""


def model_of(done: Done, source: Path) -> ModelConfig:
    """The typed `ModelConfig` that a DONE.json records."""
    values = to_mapping(compose([]))
    return from_mapping({**values, "model": dict(done.model)}, str(source / "DONE.json")).model


def precision_of(stage: Path) -> PrecisionConfig:
    """Precision a stage was trained or imported in; fp32 where there is no config.yaml."""
    path = stage / "config.yaml"
    return load(path).precision if path.is_file() else PrecisionConfig()


def stage_tensors(stage: Path) -> tuple[Done, ModelConfig, dict[str, Tensor]]:
    """Hand-off record, model and HF-named tensors (own copies, on the CPU) of a finished stage.

    Raises ValueError for an unfinished stage or a damaged checkpoint.
    """
    from pipeline.checkpoint import load_model

    done = read_done(stage)
    model = model_of(done, stage)
    with whole_model(model, precision_of(stage)) as network:
        load_model([network], stage / done.checkpoint)
        tensors = to_hf(parameters(network), model)
        return done, model, {name: tensor.cpu().clone() for name, tensor in tensors.items()}


def write_export(
    tensors: dict[str, Tensor],
    model: ModelConfig,
    done: Done,
    tokenizer: Path,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write every file of the export into `out`, which must not exist, by one rename.

    Raises ValueError when `out` exists or the tokenizer is not the stage's own.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another out=")
    digest = ChatTokenizer.from_directory(tokenizer).digest()
    if digest != done.tokenizer_digest:
        raise ValueError(
            f"{tokenizer} is not the tokenizer that {done.stage} was trained with; "
            "name that one with tokenizer=DIR"
        )
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    ids = special_ids(tokenizer)
    generation = {"_from_model_config": True, **ids, "transformers_version": TRANSFORMERS}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir()
        write_weights(tensors, aside, shard_bytes)
        for name, value in (
            ("config.json", llava_config(model, ids, dtype)),
            ("generation_config.json", {k: v for k, v in generation.items() if v is not None}),
        ):
            (aside / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for change in write_tokenizer(tokenizer, aside, model.text.max_positions):
            print(f"note: {change}")
        write_processor(model, aside)
        (aside / "README.md").write_text(_card(tensors, model, done, dtype), encoding="utf-8")
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(aside)
        aside.rename(out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export(stage: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None) -> None:
    """Export a finished stage directory; see `write_export` and `stage_tensors` for errors."""
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another out=")
    done, model, tensors = stage_tensors(stage)
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} is none of {', '.join(DTYPES)}")
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    write_export(tensors, model, done, tokenizer or default_tokenizer(stage), out)


def default_tokenizer(stage: Path) -> Path:
    """The tokenizer in the import of the stage's run (or in `stage` itself, if it is one)."""
    for directory in (stage / "tokenizer", stage.parent / "import" / "tokenizer"):
        if directory.is_dir():
            return directory
    raise ValueError(f"no import/tokenizer beside {stage}; name it with tokenizer=DIR")


def _card(tensors: dict[str, Tensor], model: ModelConfig, done: Done, dtype: str) -> str:
    from models.anyres import AnyresGeometry

    return _CARD.format(
        name=model.name,
        stage=done.stage,
        step=done.step,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=dtype,
        transformers=TRANSFORMERS,
        tile=model.vision.image_size,
        tokens=AnyresGeometry.from_model(model).max_tokens(),
        trained=", ".join(done.trained) or "nothing yet",
        frozen=", ".join(done.frozen) or "nothing",
    )


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("stage", "out", "tokenizer", "dtype"))
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; usage: {USAGE}")
    stage, out = required(ours, "stage", USAGE), required(ours, "out", USAGE)
    tokenizer = Path(ours["tokenizer"]) if ours.get("tokenizer") else None
    export(stage, out, tokenizer, ours.get("dtype"))
    print(f"exported {stage} to {out}")


if __name__ == "__main__":
    sys.exit(run(main))
