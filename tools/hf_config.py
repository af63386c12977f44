"""config.json both ways: checked against `ModelConfig` on import, written on export.

Field names and defaults are those of transformers 4.57.6 (`SiglipVisionConfig`, `LlamaConfig`,
`LlavaNextConfig`); what 5.x writes differently (`rope_parameters`) is understood on input.
"""

from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from conf.schema.model import ROPE_SCALINGS, ModelConfig, RopeScaling
from models.anyres import AnyresGeometry
from pipeline.files import read_json

TRANSFORMERS = "4.57.6"
SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

_SIZES = {*SIGLIP_DEFAULTS, *LLAMA_DEFAULTS, "num_key_value_heads", "head_dim"} - {
    "hidden_act",
    "layer_norm_eps",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
}
_MEASURES = ("layer_norm_eps", "rms_norm_eps", "rope_theta")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a complete Hugging Face checkpoint directory")
    config = read_json(path, "the model's configuration", "get the checkpoint again")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object; get the checkpoint again")
    return config


def section(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A part of a configuration that is an object itself; empty where it is not there."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {name} is not a JSON object; get the checkpoint again")
    return found


def numbers_in(config: dict[str, Any], defaults: dict[str, Any], path: Path) -> dict[str, Any]:
    """`config` over `defaults`, every size and measure a number that can be one.

    Raises:
        ConfigError: naming the first that is not.
    """
    found = {**defaults, **config}
    for field in sorted(_SIZES & set(found)):
        value = found[field]
        if value is None and field in ("num_key_value_heads", "head_dim"):
            continue  # as many as heads, and what is left for each
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ConfigError(
                f"{path}: {field}={_short(value)} is not a positive whole number; get the "
                "checkpoint again"
            )
    for field in _MEASURES:
        if field in found:
            found[field] = measure(found[field], field, path)
    return found


def measure(value: Any, field: str, path: Path) -> float:
    """`value` as a positive, finite number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value < 1e30:
            return float(value)
    raise ConfigError(
        f"{path}: {field}={_short(value)} is not a positive number; get the checkpoint again"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_vision(config: dict[str, Any], model: ModelConfig, path: Path) -> None:
    """A SigLIP configuration (or the vision half of one) against `model.vision`."""
    if config.get("model_type") == "siglip":
        config = {"model_type": "siglip_vision_model", **section(config, "vision_config", path)}
    _expect_type(config, "siglip_vision_model", path)
    vision, found = model.vision, numbers_in(config, SIGLIP_DEFAULTS, path)
    _expect_fixed(found, {"num_channels": 3, "hidden_act": "gelu_pytorch_tanh"}, path)
    _expect(
        found,
        {
            "hidden_size": ("model.vision.hidden_size", vision.hidden_size),
            "intermediate_size": ("model.vision.intermediate_size", vision.intermediate_size),
            "num_hidden_layers": ("model.vision.layers", vision.layers),
            "num_attention_heads": ("model.vision.heads", vision.heads),
            "image_size": ("model.vision.image_size", vision.image_size),
            "patch_size": ("model.vision.patch_size", vision.patch_size),
            "layer_norm_eps": ("model.vision.layer_norm_eps", vision.layer_norm_eps),
        },
        path,
    )


def check_text(config: dict[str, Any], model: ModelConfig, path: Path) -> None:
    """A Llama configuration against `model.text`; the vocabulary may be smaller than ours."""
    _expect_type(config, "llama", path)
    text, found = model.text, numbers_in(config, LLAMA_DEFAULTS, path)
    found["num_key_value_heads"] = config.get("num_key_value_heads") or found["num_attention_heads"]
    found["head_dim"] = config.get("head_dim") or (
        found["hidden_size"] // found["num_attention_heads"]
    )
    found["rope_theta"] = rope_theta(config, path)
    found["rope_scaling"] = rope_scaling(config, path)
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    _expect_fixed(found, fixed, path)
    _expect(
        found,
        {
            "hidden_size": ("model.text.hidden_size", text.hidden_size),
            "intermediate_size": ("model.text.intermediate_size", text.intermediate_size),
            "num_hidden_layers": ("model.text.layers", text.layers),
            "num_attention_heads": ("model.text.heads", text.heads),
            "num_key_value_heads": ("model.text.kv_heads", text.kv_heads),
            "head_dim": ("model.text.head_dim", text.head_dim),
            "rms_norm_eps": ("model.text.rms_norm_eps", text.rms_norm_eps),
            "rope_theta": ("model.text.rope_theta", text.rope_theta),
        },
        path,
    )
    if found["rope_scaling"] != text.rope_scaling:
        fields = vars(found["rope_scaling"]).items()
        wanted = " ".join(f"model.text.rope_scaling.{name}={value}" for name, value in fields)
        raise ConfigError(f"{path}: another RoPE scaling than the model's; override with {wanted}")
    if found["vocab_size"] > text.vocab_size:
        raise ConfigError(
            f"{path}: vocab_size={found['vocab_size']} is more than the table's "
            f"{text.vocab_size} rows; override with model.text.vocab_size={found['vocab_size']} "
            "or more"
        )


def rope_theta(config: dict[str, Any], path: Path) -> float:
    """RoPE's base, in the form of 4.57.6 or of 5.x."""
    stated = section(config, "rope_parameters", path)
    either = config.get("rope_theta", LLAMA_DEFAULTS["rope_theta"])
    return measure(stated.get("rope_theta", either), "rope_theta", path)


def rope_scaling(config: dict[str, Any], path: Path) -> RopeScaling:
    """The scaling that a Llama configuration states, in the form of 4.57.6 or of 5.x.

    Raises:
        ConfigError: a kind that is not known here.
    """
    stated = section(config, "rope_scaling", path) or section(config, "rope_parameters", path)
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    if kind not in ROPE_SCALINGS:
        raise ConfigError(
            f"{path}: rope_scaling={_short(stated)} is not supported, only "
            f"{', '.join(ROPE_SCALINGS[1:])}; give a checkpoint with one of these or without"
        )

    def stretch(name: str) -> float:
        return measure(stated.get(name), f"rope_scaling.{name}", path)

    if kind == "linear":
        return RopeScaling(kind, stretch("factor"))
    return RopeScaling(
        kind,
        stretch("factor"),
        stretch("low_freq_factor"),
        stretch("high_freq_factor"),
        int(stretch("original_max_position_embeddings")),
    )


def stated_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if scaling.kind == "none":
        return None
    stated: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        stated |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return stated


def check_llava(config: dict[str, Any], model: ModelConfig, path: Path) -> None:
    """A whole `LlavaNextForConditionalGeneration` configuration against `model`."""
    _expect_type(config, "llava_next", path)
    check_vision(section(config, "vision_config", path), model, path)
    check_text(section(config, "text_config", path), model, path)
    fixed = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "full"}
    _expect_fixed({**fixed, "vision_feature_select_strategy": "default", **config}, fixed, path)
    pinpoints = [list(pair) for pair in AnyresGeometry.from_model(model).pinpoints]
    _expect(
        {"vision_feature_layer": -2, "multimodal_projector_bias": True, **config},
        {
            "image_token_index": ("model.image_token_id", model.image_token_id),
            "vision_feature_layer": ("model.vision.feature_layer", model.vision.feature_layer),
            "multimodal_projector_bias": ("model.connector.bias", model.connector.bias),
            "image_grid_pinpoints": ("model.pinpoints", pinpoints),
        },
        path,
    )


def llava_config(
    model: ModelConfig, special_ids: dict[str, int | None], dtype: str
) -> dict[str, Any]:
    """config.json of `LlavaNextForConditionalGeneration` as 4.57.6 reads it.

    `special_ids`: `bos_token_id`, `eos_token_id`, `pad_token_id`; `dtype`: float32 or bfloat16.
    """
    vision, text = model.vision, model.text
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "dtype": dtype,
        "image_grid_pinpoints": [list(pair) for pair in AnyresGeometry.from_model(model).pinpoints],
        "image_seq_length": vision.grid**2,
        "image_token_index": model.image_token_id,
        "model_type": "llava_next",
        "multimodal_projector_bias": model.connector.bias,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **special_ids,
            "dtype": dtype,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_positions,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "num_key_value_heads": text.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_scaling": stated_scaling(text.rope_scaling),
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": text.vocab_size,
        },
        "tie_word_embeddings": False,
        "transformers_version": TRANSFORMERS,
        "vision_config": {
            "attention_dropout": 0.0,
            "dtype": dtype,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "siglip_vision_model",
            "num_attention_heads": vision.heads,
            "num_channels": 3,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
            "vision_use_head": False,
        },
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "full",
    }


def _expect_type(config: dict[str, Any], model_type: str, path: Path) -> None:
    if config.get("model_type") != model_type:
        raise ConfigError(
            f"{path}: model_type={config.get('model_type')!r}, but {model_type!r} is needed here; "
            "give a checkpoint of that architecture"
        )


def _expect_fixed(found: dict[str, Any], fixed: dict[str, Any], path: Path) -> None:
    for field, value in fixed.items():
        if found.get(field) != value:
            raise ConfigError(
                f"{path}: {field}={found.get(field)!r}, but only {value!r} is supported; "
                "give another checkpoint"
            )


def _expect(found: dict[str, Any], expected: dict[str, tuple[str, Any]], path: Path) -> None:
    for field, (ours, value) in expected.items():
        if found.get(field) != value:
            typed = str(found.get(field)).replace(" ", "")
            raise ConfigError(
                f"{path}: {field}={found.get(field)!r}, but {ours}={value!r}; override with "
                f"{ours}={typed}, or give another checkpoint"
            )
