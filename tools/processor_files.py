"""The tokenizer and image-processor files of an export, in the layout of transformers 4.57.6.

Written by hand, not by the installed transformers: 5.x writes files that 4.57.6 cannot read, and
the settings below are those under which processor, model and training agree.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from conf.schema.errors import ConfigError
from conf.schema.model import ModelConfig
from data_shards.chat_template import ChatTemplate
from models.anyres import AnyresGeometry
from pipeline.files import read_json

IMAGE_TOKEN = "<image>"
TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_UNLIMITED = 10**30


@dataclass(frozen=True)
class SpecialTokens:
    """Texts from tokenizer_config.json; `eos` ends an answer."""

    bos: str | None
    eos: str
    pad: str
    unk: str | None


def read_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json of a directory; ValueError when missing or damaged."""
    path = directory / TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; give the directory of a fast tokenizer (transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); get the tokenizer again") from None


def _read_tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} is missing; get the tokenizer again")
    config = read_json(path, "the tokenizer's configuration", "get the tokenizer again")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object; get the tokenizer again")
    return config


def special_tokens(directory: Path) -> SpecialTokens:
    """The special tokens' texts; ValueError when there is no end token."""
    config = _read_tokenizer_config(directory)

    def text(name: str) -> str | None:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return str(value) if value else None

    eos = text("eos_token")
    if eos is None:
        raise ValueError(f"{directory / CONFIG} has no eos_token; set it to what ends an answer")
    return SpecialTokens(text("bos_token"), eos, text("pad_token") or eos, text("unk_token"))


def special_ids(directory: Path) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` for config.json and generation_config.json."""
    tokens, tokenizer = special_tokens(directory), read_tokenizer(directory)
    ids: dict[str, int | None] = {}
    for name, text in (("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad)):
        ids[f"{name}_token_id"] = None if text is None else tokenizer.token_to_id(text)
        if text is not None and ids[f"{name}_token_id"] is None:
            raise ValueError(
                f"{directory / CONFIG} names {name}_token={text!r}, which {TOKENIZER} does not "
                "have; correct one of them"
            )
    return ids


def import_tokenizer(source: Path, target: Path, image_token_id: int) -> list[str]:
    """Copy a tokenizer into `target`, adding `<image>` where it is missing.

    Returns what was changed, for the user to read; nothing changed means the same bytes.
    Raises ConfigError when `<image>` does not get the id that the model is configured with.
    """
    changes: list[str] = []
    tokenizer, config = read_tokenizer(source), _read_tokenizer_config(source)
    special_ids(source)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / CONFIG, target / CONFIG)
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
        tokenizer.save(str(target / TOKENIZER))
        changes.append(f"{IMAGE_TOKEN} added with id {tokenizer.token_to_id(IMAGE_TOKEN)}")
    else:
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    found = tokenizer.token_to_id(IMAGE_TOKEN)
    if found != image_token_id:
        raise ConfigError(
            f"{source}: {IMAGE_TOKEN} has id {found}, but model.image_token_id={image_token_id}; "
            f"override with model.image_token_id={found}"
        )
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, target / TEMPLATE)
    elif isinstance(config.get("chat_template"), str):
        (target / TEMPLATE).write_text(config["chat_template"], encoding="utf-8")
        changes.append(f"{TEMPLATE} taken out of {CONFIG}")
    else:
        raise ValueError(f"{source} has no {TEMPLATE}; put one there that also renders images")
    return changes


def write_tokenizer(source: Path, target: Path, max_positions: int) -> list[str]:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

    A post-processor that adds BOS by itself (EuroLLM's) is taken out and the chat template writes
    BOS instead, so that every reader sees exactly the one that training saw: vLLM renders chats
    without the post-processor, lmms-eval with it.
    `model_input_names` leaves out `token_type_ids`, which `generate` of 4.57.6 refuses.
    Returns what was changed.
    """
    changes: list[str] = []
    tokenizer, tokens = read_tokenizer(source), special_tokens(source)
    template = (source / TEMPLATE).read_text(encoding="utf-8")
    content = json.loads((source / TOKENIZER).read_text(encoding="utf-8"))
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        content["post_processor"] = None
        changes.append("BOS is written by the chat template, no longer by the tokenizer")
        _write_json(target / TOKENIZER, content, indent=None)
        known = {"bos_token": tokens.bos or "", "eos_token": tokens.eos}
        hello = [{"role": "user", "content": "Olá"}]
        if not ChatTemplate(template, known).render(hello, True).startswith(tokens.bos or ""):
            template = "{{- bos_token }}" + template
    else:
        shutil.copyfile(source / TOKENIZER, target / TOKENIZER)
    (target / TEMPLATE).write_text(template, encoding="utf-8")
    candidates = {
        "bos_token": tokens.bos,
        "eos_token": tokens.eos,
        "image_token": IMAGE_TOKEN,
        "pad_token": tokens.pad,
        "unk_token": tokens.unk,
    }
    named = {name: text for name, text in candidates.items() if text is not None}
    added = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = {
        "added_tokens_decoder": {
            str(token["id"]): {name: token[name] for name in added}
            for token in content.get("added_tokens", [])
        },
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_positions or _UNLIMITED,
        "padding_side": "left",
        "processor_class": "LlavaNextProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    _write_json(target / CONFIG, dict(sorted(config.items())))
    _write_json(target / "special_tokens_map.json", named)
    return changes


def processor_settings(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Contents of preprocessor_config.json and processor_config.json, by file name."""
    side = model.vision.image_size
    image_processor = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": [list(pair) for pair in AnyresGeometry.from_model(model).pinpoints],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaNextProcessor",
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    processor = {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 0,
        "patch_size": model.vision.patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "full",
    }
    return {"preprocessor_config.json": image_processor, "processor_config.json": processor}


def write_processor(model: ModelConfig, target: Path) -> None:
    """preprocessor_config.json and processor_config.json."""
    for name, settings in processor_settings(model).items():
        _write_json(target / name, settings)


def _write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
