"""A model configuration from Hugging Face files: nothing typed by hand, nothing guessed.

    python -m tools.model_from_hf name=mine vision=DIR language=DIR [tokenizer=DIR]
    python -m tools.model_from_hf name=mine llava=DIR

Prints what conf/model/NAME.yaml holds, or writes it there with write=true; sizes, RoPE base and
scaling come from the checkpoints' config.json, the id of `<image>` from the tokenizer. What no
checkpoint states (tiles, feature layer) keeps LLaVA-NeXT's or AMALIA-VL's value, and is marked.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import conf
from conf.schema.errors import ConfigError
from conf.schema.model import ConnectorConfig, ModelConfig, TextConfig, VisionConfig
from data_shards.durable import replacing
from models.anyres import pinpoints_up_to
from tools.command import required, run, split_arguments
from tools.hf_config import (
    LLAMA_DEFAULTS,
    SIGLIP_DEFAULTS,
    numbers_in,
    read_config,
    rope_scaling,
    rope_theta,
    section,
)
from tools.processor_files import IMAGE_TOKEN, read_tokenizer

USAGE = "python -m tools.model_from_hf name=NAME vision=DIR language=DIR | llava=DIR [write=true]"
VOCABULARY_MULTIPLE = 64  # rows of the grown embedding table, for tensor-parallel ranks
MAX_TILES = 12


@dataclass(frozen=True)
class Found:
    """A model, and which of its fields no checkpoint stated."""

    model: ModelConfig
    assumed: tuple[str, ...]


def vision_of(config: dict[str, Any], path: Path) -> VisionConfig:
    """`model.vision` from a SigLIP configuration."""
    if config.get("model_type") == "siglip":
        config = section(config, "vision_config", path)
    found = numbers_in(config, SIGLIP_DEFAULTS, path)
    return VisionConfig(
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        layer_norm_eps=found["layer_norm_eps"],
    )


def text_of(config: dict[str, Any], path: Path) -> TextConfig:
    """`model.text` from a Llama configuration; the vocabulary is the checkpoint's own."""
    found = numbers_in(config, LLAMA_DEFAULTS, path)
    heads = found["num_attention_heads"]
    return TextConfig(
        hidden_size=found["hidden_size"],
        intermediate_size=found["intermediate_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or found["hidden_size"] // heads,
        vocab_size=found["vocab_size"],
        max_positions=found["max_position_embeddings"],
        rms_norm_eps=found["rms_norm_eps"],
        rope_theta=rope_theta(config, path),
        rope_scaling=rope_scaling(config, path),
    )


def from_backbones(name: str, vision: Path, language: Path, tokenizer: Path) -> Found:
    """A SigLIP and a Llama checkpoint, to be joined by a fresh connector.

    The vocabulary grows, once, to hold `<image>` and to a multiple of 64 rows, where it must.
    """
    text = text_of(read_config(language), language / "config.json")
    words = read_tokenizer(tokenizer)
    image = words.token_to_id(IMAGE_TOKEN)
    if image is None:
        image = words.get_vocab_size()  # the id that `make import` will give it
    if image >= text.vocab_size:
        text.vocab_size = -(-(image + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model = ModelConfig(
        name=name,
        vision=vision_of(read_config(vision), vision / "config.json"),
        text=text,
        image_token_id=image,
        max_tiles=MAX_TILES,
    )
    return Found(model, ("vision.feature_layer", "connector.bias", "max_tiles"))


def from_llava(name: str, directory: Path) -> Found:
    """A whole LLaVA-NeXT checkpoint."""
    path = directory / "config.json"
    config = read_config(directory)
    if config.get("model_type") != "llava_next":
        raise ValueError(f"{path}: model_type={config.get('model_type')!r} is not llava_next")
    vision = vision_of(section(config, "vision_config", path), path)
    try:
        vision.feature_layer = int(config.get("vision_feature_layer", -2))
        pinpoints = [[int(side) for side in pair] for pair in config["image_grid_pinpoints"]]
        image = int(config["image_token_index"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: vision_feature_layer, image_grid_pinpoints or image_token_index is not what "
            f"LLaVA-NeXT writes ({error}); get the checkpoint again"
        ) from None
    model = ModelConfig(
        name=name,
        vision=vision,
        text=text_of(section(config, "text_config", path), path),
        image_token_id=image,
        connector=ConnectorConfig(bias=bool(config.get("multimodal_projector_bias", True))),
        pinpoints=pinpoints,
    )
    for tiles in range(1, 37):
        if pinpoints == [list(pair) for pair in pinpoints_up_to(vision.image_size, tiles)]:
            model.max_tiles, model.pinpoints = tiles, None
    return Found(model, ())


def as_yaml(found: Found, sources: str) -> str:
    """The file's text.

    Raises:
        ConfigError: what the checkpoints state cannot be a model.
    """
    try:
        found.model.check()
    except ConfigError as error:
        raise ConfigError(f"config.json of {sources}: {error}") from None
    values = asdict(found.model)
    if values["text"]["rope_scaling"]["kind"] == "none":
        del values["text"]["rope_scaling"]
    if values["pinpoints"] is None:
        del values["pinpoints"]
    else:
        del values["max_tiles"]
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    notes = [f"# Written by tools.model_from_hf from {sources}."]
    if found.assumed:
        notes.append(f"# No checkpoint states {', '.join(found.assumed)}: set them as you train.")
    return "\n".join([*notes, text])


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    words = ("name", "vision", "language", "tokenizer", "llava", "write")
    ours, rest = split_arguments(arguments, words)
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; usage: {USAGE}")
    name = str(required(ours, "name", USAGE))
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"name={name}: letters, digits, - and _ only")
    if ours.get("llava"):
        directory = Path(ours["llava"])
        text = as_yaml(from_llava(name, directory), directory.name)
    else:
        vision, language = required(ours, "vision", USAGE), required(ours, "language", USAGE)
        found = from_backbones(name, vision, language, Path(ours.get("tokenizer") or language))
        text = as_yaml(found, f"{vision.name} and {language.name}")
    if ours.get("write") != "true":
        print(text, end="")
        return
    path = Path(conf.__path__[0]) / "model" / f"{name}.yaml"
    if path.exists():
        raise ValueError(f"{path} exists already; remove it or choose another name=")
    with replacing(path) as file:
        file.write(text.encode())
    print(f"written {path}: use model={name}")


if __name__ == "__main__":
    sys.exit(run(main))
