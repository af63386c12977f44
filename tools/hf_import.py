"""Hugging Face backbones -> a Megatron checkpoint that stage 1 begins from.

    python -m tools.hf_import model=tiny vision=DIR language=DIR tokenizer=DIR out=runs/NAME/import
    python -m tools.hf_import model=tiny llava=DIR out=runs/NAME/import

The first form joins a SigLIP and a Llama-architecture checkpoint by a fresh connector; the second
takes a whole `LlavaNextForConditionalGeneration`, connector and tokenizer included. Reads
safetensors only, a tensor at a time: no GPU, little memory. Every other `key=value` overrides the
configuration (`model.text.rope_theta=...`, `precision=bf16`); `seed=` draws another connector,
`workers=` reads and writes that many tensors at once.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from conf.compose import compose, dump
from conf.schema import Config, ModelConfig
from data_shards.chat import ChatTokenizer
from data_shards.durable import sync_directory
from models.anyres import AnyresGeometry
from models.hf_state import (
    Match,
    Shape,
    connector_table,
    match_llava,
    match_text,
    match_vision,
)
from pipeline.checkpoint_files import saved_steps
from pipeline.checkpoint_writer import LazyPart, write_checkpoint
from pipeline.files import digest_and_fsync, saying_where_full, write_atomically
from pipeline.handoff import DONE, Done, write_done
from pipeline.manifest import MANIFEST, Manifest
from tools.aside import only_one
from tools.command import required, run, split_arguments
from tools.hf_config import check_llava, check_text, check_vision, read_config
from tools.import_weights import lazy_parts, ready_part
from tools.processor_files import import_tokenizer, special_ids, write_processor
from tools.safetensors_reader import SafetensorsDirectory

USAGE = "python -m tools.hf_import model=NAME vision=DIR language=DIR tokenizer=DIR out=DIR"
ARGUMENTS = ("vision", "language", "llava", "tokenizer", "out", "seed", "workers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INITIALIZER_RANGE = 0.02  # LlamaConfig.initializer_range, which LlavaNext takes for its linears


def fresh_connector(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Connector and `image_newline` as `LlavaNextPreTrainedModel._init_weights` draws them.

    Linears normal(0, 0.02) with zero bias, newline normal(0, 1/sqrt(hidden)); float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in connector_table(model):
        if entry.megatron.endswith("bias"):
            tensors[entry.megatron] = torch.zeros(entry.shape)
            continue
        newline = entry.megatron == "image_newline"
        std = 1 / math.sqrt(model.text.hidden_size) if newline else INITIALIZER_RANGE
        tensors[entry.megatron] = torch.randn(entry.shape, generator=generator) * std
    return tensors


def stacked_layers(model: ModelConfig) -> dict[str, int]:
    """Layers of each block that Megatron stacks in a checkpoint."""
    return {
        "vision_tower.encoder.layers": model.vision.layers_used,
        "language_model.decoder.layers": model.text.layers,
    }


def _matched(
    directory: Path,
    match: Callable[[Mapping[str, Shape], ModelConfig], list[Match]],
    model: ModelConfig,
    opened: ExitStack,
) -> tuple[SafetensorsDirectory, list[Match]]:
    """A checkpoint's tensors against the table; ValueError names the directory."""
    try:
        source = opened.enter_context(SafetensorsDirectory(directory))
        return source, match(source.shapes(), model)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def import_model(
    config: Config,
    out: Path,
    tokenizer: Path,
    vision: Path | None = None,
    language: Path | None = None,
    llava: Path | None = None,
    seed: int = 1234,
    workers: int = 2,
) -> Path:
    """Write the stage directory `out`: checkpoint, tokenizer/, processor/, config.yaml, DONE.json.

    Of `config`, `model` and `precision` count. Give either `llava` or both `vision` and
    `language`. Returns the checkpoint's directory.
    Raises ValueError or OSError; without DONE.json nothing is used, so running again is safe.
    """
    if [step for step in saved_steps(out) if step]:
        raise ValueError(f"{out} holds a training run's checkpoints; choose another out=")
    model = config.model
    model.check()
    if llava is not None:
        check_llava(read_config(llava), model, llava / "config.json")
    else:
        assert vision is not None and language is not None
        check_vision(read_config(vision), model, vision / "config.json")
        text_config = read_config(language)
        check_text(text_config, model, language / "config.json")
        positions = text_config.get("max_position_embeddings")
        if positions != model.text.max_positions:
            print(
                f"note: the language model says {positions} positions, model.text.max_positions="
                f"{model.text.max_positions} is used"
            )
    out.mkdir(parents=True, exist_ok=True)
    for change in import_tokenizer(tokenizer, out / "tokenizer", model.image_token_id):
        print(f"note: tokenizer: {change}; build shards with data.tokenizer={out / 'tokenizer'}")
    ids = special_ids(out / "tokenizer")
    # Before the weights, which take long: its template may be none that can be read.
    tokenizer_digest = ChatTokenizer.from_directory(out / "tokenizer").digest()
    (out / "processor").mkdir(exist_ok=True)
    write_processor(model, out / "processor")
    write_atomically(out / "config.yaml", dump(config).encode())
    dtype = DTYPES[config.precision.params]
    with ExitStack() as opened:
        if llava is not None:
            wanted = [(llava, match_llava)]
        else:
            assert vision is not None and language is not None
            wanted = [(vision, match_vision), (language, match_text)]
        layers = stacked_layers(model)
        parts: list[LazyPart] = []
        # All of them are compared before anything is written.
        found = [_matched(directory, match, model, opened) for directory, match in wanted]
        for source, matches in found:
            parts += lazy_parts(source, matches, dtype, layers)
        if llava is None:
            fresh = fresh_connector(model, seed)
            parts += [ready_part(name, tensor, dtype) for name, tensor in fresh.items()]
        count = sum(torch.Size(part.shape).numel() for part in parts)
        tensors = len({part.name for part in parts})
        print(f"{tensors} tensors, {count:,} parameters; eos token {ids['eos_token_id']}")
        manifest = Manifest(
            step=0,
            samples=0,
            plan_digest="import",
            config_digest="import",
            layout={"world_size": 1, "tensor": 1, "pipeline": 1, "context": 1},
            code_version="import",
            files={},
        )
        checkpoint = write_checkpoint(parts, out, manifest, workers)
    for folder in (out / "tokenizer", out / "processor"):
        for path in folder.iterdir():
            digest_and_fsync(path)
        sync_directory(folder)
    finish_import(out, checkpoint, model, tokenizer_digest)
    return checkpoint


def finish_import(out: Path, checkpoint: Path, model: ModelConfig, tokenizer_digest: str) -> None:
    """Write DONE.json of an import whose files are all there."""
    done = Done(
        stage="import",
        number=0,
        checkpoint=str(checkpoint.relative_to(out)),
        checkpoint_digest=digest_and_fsync(checkpoint / MANIFEST)[1],
        step=0,
        model=asdict(model),
        tokenizer_digest=tokenizer_digest,
        geometry_digest=AnyresGeometry.from_model(model).digest(),
    )
    write_done(out, done)


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, overrides = split_arguments(arguments, ARGUMENTS)
    out = required(ours, "out", USAGE)
    llava = Path(ours["llava"]) if ours.get("llava") else None
    if llava is not None and (ours.get("vision") or ours.get("language")):
        raise ValueError("llava= is a whole model; leave out vision= and language=")
    vision = None if llava else required(ours, "vision", USAGE)
    language = None if llava else required(ours, "language", USAGE)
    tokenizer = Path(ours.get("tokenizer") or llava or required(ours, "tokenizer", USAGE))
    for word in ("seed", "workers"):
        if not ours.get(word, "1").isdigit() or ours.get(word) == "0":
            raise ValueError(f"{word}={ours[word]} is not a positive whole number")
    # What the state-dict adapter left out or enlarged.
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s", stream=sys.stdout)
    logging.getLogger("models.hf_state").setLevel(logging.INFO)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.import.lock")
    with (
        only_one(lock, f"another import is writing {out}"),
        saying_where_full(out, "make room and run the same command again"),
    ):
        if (out / DONE).is_file():
            print(f"{out} is already imported; remove it to import again")
            return
        checkpoint = import_model(
            compose(overrides),
            out,
            tokenizer,
            vision=vision,
            language=language,
            llava=llava,
            seed=int(ours.get("seed") or 1234),
            workers=int(ours.get("workers") or 2),
        )
    print(f"imported into {checkpoint}")


if __name__ == "__main__":
    sys.exit(run(main))
