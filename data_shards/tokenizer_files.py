"""A tokenizer directory beside its tokenizer.json: settings, special tokens, chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.sample import IMAGE_MARK


class TokenizerError(ValueError):
    """A tokenizer directory that cannot be used; the message says what to change."""


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json. Raises TokenizerError where it is missing or damaged."""
    path = directory / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path} cannot be read ({one_line(error)}); point data.tokenizer at a Hugging Face "
            "tokenizer directory"
        ) from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is not a JSON object; restore it from the tokenizer's origin")
    return config


def read_template(directory: Path, config: Mapping[str, Any]) -> str:
    """The chat template, from its own file or from the settings. Raises TokenizerError."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{path} cannot be read ({one_line(error)}); restore it from the tokenizer's origin"
            ) from None
    template = config.get("chat_template")
    if not isinstance(template, str):
        raise TokenizerError(
            f"{directory} has no chat template; put it in {path.name} or in tokenizer_config.json"
        )
    return template


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens, as transformers passes them to the template."""
    found: dict[str, str] = {"image_token": IMAGE_MARK}
    extra = config.get("extra_special_tokens")
    entries = {**config, **(extra if isinstance(extra, dict) else {})}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def one_line(error: Exception) -> str:
    """An error's words without line breaks."""
    return " ".join(str(error).split())
