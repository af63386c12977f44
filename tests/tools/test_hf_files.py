"""What an import refuses, and that the files of an export are those of transformers 4.57.6."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from conf.compose import compose
from conf.schema import ModelConfig
from conf.schema.errors import ConfigError
from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry
from tests.tools.small_backbones import IMAGE_ID, OVERRIDES, write_tokenizer
from tools.hf_config import check_llava, check_text, check_vision, llava_config, read_config
from tools.model_from_hf import as_yaml, from_llava, text_of
from tools.processor_files import (
    import_tokenizer,
    special_ids,
    write_processor,
)
from tools.processor_files import (
    write_tokenizer as export_tokenizer,
)
from tools.safetensors_reader import SafetensorsDirectory


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return compose(OVERRIDES).model


def good_text() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }


def good_vision() -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }


HERE = Path("config.json")
NOT_NUMBERS: tuple[Any, ...] = ("64", -64, 0, 2.5, True, [64], {}, 10**40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, r"override with model\.text\.rope_theta=500000\.0"),
        ({"rope_parameters": {"rope_theta": 1e6}}, r"model\.text\.rope_theta=1000000\.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"model\.text\.rope_scaling\.kind=linear model\.text\.rope_scaling\.factor=2\.0",
        ),
        ({"rms_norm_eps": 1e-6}, r"model\.text\.rms_norm_eps=1e-06"),
        ({"num_key_value_heads": None}, r"model\.text\.kv_heads=4"),
        ({"head_dim": 16}, r"model\.text\.head_dim=16"),
        ({"num_hidden_layers": 3}, r"model\.text\.layers=3"),
        ({"hidden_size": 64}, r"model\.text\.hidden_size=64"),
        ({"vocab_size": 1000}, r"model\.text\.vocab_size=1000"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "model_type='mistral'"),
    ],
)
def test_text_fields_are_checked(model: ModelConfig, change: dict[str, Any], message: str) -> None:
    check_text(good_text(), model, HERE)
    with pytest.raises(ConfigError, match=message):
        check_text({**good_text(), **change}, model, HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, r"model\.vision\.patch_size=16"),
        ({"image_size": 64}, r"model\.vision\.image_size=64"),
        ({"num_attention_heads": 2}, r"model\.vision\.heads=2"),
        ({"layer_norm_eps": 1e-5}, r"model\.vision\.layer_norm_eps=1e-05"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"model_type": "clip_vision_model"}, "siglip_vision_model"),
    ],
)
def test_vision_fields_are_checked(
    model: ModelConfig, change: dict[str, Any], message: str
) -> None:
    check_vision(good_vision(), model, HERE)
    check_vision({"model_type": "siglip", "vision_config": good_vision()}, model, HERE)
    with pytest.raises(ConfigError, match=message):
        check_vision({**good_vision(), **change}, model, HERE)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, None], ids=repr)
@pytest.mark.parametrize(
    "field", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
def test_sizes_that_are_none_are_named(model: ModelConfig, field: str, value: Any) -> None:
    hostile = {**good_text(), field: value}
    with pytest.raises(ConfigError, match=rf"config\.json: {field}=.*is not a positive whole"):
        check_text(hostile, model, HERE)
    with pytest.raises(ConfigError, match=rf"config\.json: {field}=.*is not a positive whole"):
        text_of(hostile, HERE)


@pytest.mark.parametrize("value", ["1e4", -1.0, 0, float("nan"), float("inf"), True, [1], None])
def test_measures_that_are_none_are_named(model: ModelConfig, value: Any) -> None:
    for field, config in (
        ("rope_theta", {"rope_theta": value}),
        ("rope_theta", {"rope_parameters": {"rope_theta": value}}),
        ("rms_norm_eps", {"rms_norm_eps": value}),
        (r"rope_scaling\.factor", {"rope_scaling": {"rope_type": "linear", "factor": value}}),
        (r"rope_scaling\.low_freq", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    ):
        with pytest.raises(ConfigError, match=rf"config\.json: {field}.*is not a positive number"):
            check_text({**good_text(), **config}, model, HERE)


@pytest.mark.parametrize("value", ["tall", [1], 7])
def test_parts_that_are_no_objects_are_named(
    model: ModelConfig, tmp_path: Path, value: Any
) -> None:
    whole = llava_config(model, {}, "float32")
    for field in ("vision_config", "text_config"):
        with pytest.raises(ConfigError, match=f"config.json: {field} is not a JSON object"):
            check_llava({**whole, field: value}, model, HERE)
        (tmp_path / "config.json").write_text(json.dumps({**whole, field: value}))
        with pytest.raises(ConfigError, match=f"config.json: {field} is not a JSON object"):
            from_llava("mine", tmp_path)
    for field in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=f"config.json: {field} is not a JSON object"):
            check_text({**good_text(), field: value}, model, HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_index": None}, "or image_token_index is not what"),
        ({"image_token_index": "x"}, "or image_token_index is not what"),
        ({"image_token_index": 10**30}, "model.image_token_id=1000"),
        ({"image_grid_pinpoints": 5}, "image_grid_pinpoints or"),
        ({"image_grid_pinpoints": [["a", 1]]}, "image_grid_pinpoints or"),
        ({"image_grid_pinpoints": [[-32, 32]]}, "model.pinpoints entry"),
        ({"vision_feature_layer": [-2, -3]}, "vision_feature_layer, "),
        ({"vision_feature_layer": 99}, "model.vision.feature_layer=99"),
    ],
    ids=str,
)
def test_llava_fields_are_checked_before_a_model_is_written(
    model: ModelConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    whole = llava_config(model, {}, "float32")
    (tmp_path / "config.json").write_text(json.dumps(whole))
    as_yaml(from_llava("mine", tmp_path), "here")
    (tmp_path / "config.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        as_yaml(from_llava("mine", tmp_path), "here")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' + "9" * 5000 + "}", "[]", "\udcff"])
def test_config_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json.*get the checkpoint again"):
        read_config(tmp_path)


def test_config_is_what_transformers_would_write(model: ModelConfig) -> None:
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 2}
    ours = llava_config(model, ids, "float32")
    check_llava(ours, model, HERE)
    pinpoints = [list(pair) for pair in AnyresGeometry.from_model(model).pinpoints]
    theirs = LlavaNextConfig(
        vision_config=SiglipVisionConfig(**good_vision(), vision_use_head=False),
        text_config=LlamaConfig(
            **{**good_text(), "vocab_size": 320}, max_position_embeddings=512, **ids
        ),
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    assert (
        LlavaNextConfig(**ours).to_dict()
        == LlavaNextConfig(
            **{
                **theirs.to_dict(),
                **{k: ours[k] for k in ("architectures", "dtype")},
                "vision_config": {**theirs.vision_config.to_dict(), "dtype": "float32"},
                "text_config": {
                    **theirs.text_config.to_dict(),
                    "dtype": "float32",
                    "architectures": ["LlamaForCausalLM"],
                },
            }
        ).to_dict()
    )
    with pytest.raises(ConfigError, match=r"model\.pinpoints=\[\[32,32\]\]"):
        check_llava({**ours, "image_grid_pinpoints": [[32, 32]]}, model, HERE)
    with pytest.raises(ConfigError, match="vision_feature_select_strategy='default'"):
        check_llava({**ours, "vision_feature_select_strategy": "default"}, model, HERE)
    with pytest.raises(ConfigError, match=r"model\.image_token_id=7"):
        check_llava({**ours, "image_token_index": 7}, model, HERE)


def test_processor_files_are_what_transformers_writes(model: ModelConfig, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    assert export_tokenizer(tmp_path / "tokenizer", ours, model.text.max_positions) == []
    write_processor(model, ours)
    pinpoints = [list(pair) for pair in AnyresGeometry.from_model(model).pinpoints]
    side = {"height": 32, "width": 32}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size=side,
        image_grid_pinpoints=pinpoints,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer/tokenizer.json"),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )
    template = (tmp_path / "tokenizer/chat_template.jinja").read_text()
    LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=template,
    ).save_pretrained(theirs)
    for path in theirs.iterdir():
        mine = (ours / path.name).read_text()
        if path.suffix == ".json" and path.name != "tokenizer.json":
            assert json.loads(mine) == json.loads(path.read_text()), path.name
    assert (ours / "chat_template.jinja").read_text() == template
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def test_bos_moves_from_tokenizer_to_template(model: ModelConfig, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "in", automatic_bos=True)
    out = tmp_path / "out"
    out.mkdir()
    changes = export_tokenizer(tmp_path / "in", out, 512)
    assert len(changes) == 1 and "BOS" in changes[0]
    messages = [{"role": "user", "content": "Olá"}]
    trained = ChatTokenizer.from_directory(tmp_path / "in").encode_prompt(messages)
    exported = AutoTokenizer.from_pretrained(out)
    for special in (True, False):  # lmms-eval renders then encodes; vLLM adds no special tokens
        text = exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert exported(text, add_special_tokens=special)["input_ids"] == trained.tolist()
    assert trained.tolist().count(1) == 1


def test_image_token_is_added_once_and_must_have_its_id(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "with")
    write_tokenizer(tmp_path / "without", with_image=False)
    changes = import_tokenizer(tmp_path / "without", tmp_path / "out", IMAGE_ID)
    assert changes == [f"<image> added with id {IMAGE_ID}"]
    assert import_tokenizer(tmp_path / "out", tmp_path / "again", IMAGE_ID) == []
    assert import_tokenizer(tmp_path / "with", tmp_path / "same", IMAGE_ID) == []
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "with" / name).read_bytes()
    with pytest.raises(ConfigError, match=rf"override with model.image_token_id={IMAGE_ID}"):
        import_tokenizer(tmp_path / "with", tmp_path / "other", 7)
    assert special_ids(tmp_path / "with") == {
        "bos_token_id": 1,
        "eos_token_id": 4,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("tokenizer.json", lambda p: p.write_text("{"), "tokenizer.json is damaged"),
        ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
        ("tokenizer_config.json", lambda p: p.write_text("[]"), "not a JSON object"),
        ("tokenizer_config.json", lambda p: p.write_text("{}"), "no eos_token"),
        (
            "tokenizer_config.json",
            lambda p: p.write_text('{"eos_token": "<end>"}'),
            "eos_token='<end>'",
        ),
        ("chat_template.jinja", Path.unlink, "has no chat_template.jinja"),
    ],
)
def test_damaged_tokenizers_are_named(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], message: str
) -> None:
    write_tokenizer(tmp_path / "in")
    spoil(tmp_path / "in" / name)
    with pytest.raises(ValueError, match=message):
        import_tokenizer(tmp_path / "in", tmp_path / "out", IMAGE_ID)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        SafetensorsDirectory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pickled weights only"):
        SafetensorsDirectory(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match="not a file of its own directory"):
        SafetensorsDirectory(tmp_path)
    save_file({"b": torch.zeros(1)}, tmp_path / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(ValueError, match="promises tensor a"):
        SafetensorsDirectory(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors is missing"):
        SafetensorsDirectory(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        SafetensorsDirectory(tmp_path)
    shutil.copyfile(tmp_path / "part.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        SafetensorsDirectory(tmp_path)
