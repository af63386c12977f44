"""Small tokenizers, pictures and sources for the tests of this room."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from conf.schema.data import DataConfig, SourceConfig
from conf.schema.model import ModelConfig, TextConfig, VisionConfig
from conf.schema.stage import LearningRates, StageConfig
from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry, pinpoints_up_to

GEOMETRY = AnyresGeometry(tile=32, patch=8, pinpoints=pinpoints_up_to(32, 4))
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- item['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TEXTS = [
    "Quantos algarismos há na imagem?",
    "Há três algarismos: sete, dois e nove.",
    "Qual é o algarismo mais à esquerda?\nResponde só com o número.",
    "O autocarro está a chegar à paragem; o comboio já partiu.",
    "De que cor é o fundo? É verde, azul, vermelho ou castanho.",
    "A soma de quatro e cinco é nove. Porquê? Porque sim!",
    "user\nassistant\nsystem\nÉs um assistente prestável.",
]


def train_tokenizer(kind: str) -> Tokenizer:
    """`bytes`: GPT-2-like byte-level BPE; `fallback`: Llama- and EuroLLM-like byte-fallback BPE."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = SPECIAL
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet, special = [], SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    if kind == "fallback":
        tokenizer = _without_byte_specials(tokenizer)
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def _without_byte_specials(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens were given as special to be in the vocabulary; Llama has them as ordinary."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def write_tokenizer(directory: Path, kind: str = "bytes", template: str = TEMPLATE) -> Path:
    """A tokenizer directory as transformers would write it."""
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(kind).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template)
    return directory


def model_config(tokenizer: ChatTokenizer) -> ModelConfig:
    """The smallest model that the toy tokenizer fits."""
    return ModelConfig(
        name="toy",
        vision=VisionConfig(32, 64, 2, 2, image_size=32, patch_size=8),
        text=TextConfig(32, 64, 2, 2, 2, 16, vocab_size=1024, max_positions=512),
        image_token_id=tokenizer.image_token_id,
        max_tiles=4,
    )


def stage(**changes: Any) -> StageConfig:
    """A stage for plans; lengths suit the toy geometry (37 to 84 tokens an image)."""
    values: dict[str, Any] = {
        "name": "stage2",
        "number": 2,
        "objective": "sft",
        "lr": LearningRates(language=1e-3),
        "sequence_length": 512,
        "global_batch_size": 4,
        "steps": 5,
    }
    return StageConfig(**{**values, **changes})


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Noise on a gradient: every pixel tells."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height * width * 3).reshape(height, width, 3)
    return Image.fromarray((ramp + generator.integers(0, 56, ramp.shape)).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image as file bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


SIZES = [(40, 90), (64, 64), (100, 30), (33, 47), (20, 20), (130, 61)]


def chat_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Samples with one image, two images, none, in string and list content, one or two turns."""
    rows = []
    for n in range(first, first + count):
        kind = n % 4
        image = encoded(picture(n, *SIZES[n % len(SIZES)]), ("PNG", "JPEG")[n % 2])
        answer = {"role": "assistant", "content": f"Há {n} algarismos."}
        if kind == 0:
            question = [{"type": "image"}, {"type": "text", "text": f"Quantos há na imagem {n}?"}]
            messages, images = [{"role": "user", "content": question}, answer], [image]
        elif kind == 1:
            question = f"<image>\nQual é a cor {n}?"
            more = {"role": "user", "content": "E a soma?"}
            messages = [{"role": "user", "content": question}, answer, more, answer]
            images = [image]
        elif kind == 2:
            messages = [
                {"role": "system", "content": "És um assistente prestável."},
                {"role": "user", "content": f"Quanto é {n} e {n}?"},
                answer,
            ]
            images = []
        else:
            second = encoded(picture(n + 1000, *SIZES[(n + 2) % len(SIZES)]))
            messages = [{"role": "user", "content": "<image>\n<image>\nCompara."}, answer]
            images = [image, second]
        rows.append({"messages": messages, "images": images})
    return rows


def pair_rows(count: int) -> list[dict[str, Any]]:
    """Preference pairs, with an image and without."""
    rows = []
    for n in range(count):
        images = [encoded(picture(n, *SIZES[n % len(SIZES)]))] if n % 3 else []
        text = "<image>\nO que é isto?" if images else "Como vais para a escola?"
        rows.append(
            {
                "messages": [{"role": "user", "content": text}],
                "images": images,
                "chosen": f"Vou de autocarro número {n}.",
                "rejected": f"Vou de ônibus, que está chegando agora, linha {n}.",
            }
        )
    return rows


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 1000) -> Path:
    """Rows as Parquet: messages as JSON text (list and string content mix), images as structs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {
        "messages": [json.dumps(row["messages"]) for row in rows],
        "images": [[{"bytes": data, "path": None} for data in row["images"]] for row in rows],
    }
    for name in ("chosen", "rejected"):
        if name in rows[0]:
            columns[name] = [row[name] for row in rows]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("messages", pa.string()), ("images", pa.list_(image))]
    fields += [(name, pa.string()) for name in columns if name in ("chosen", "rejected")]
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path, row_group_size=group)
    return path


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """One JSON value a line; bytes and text go in as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for record in records:
            line = record if isinstance(record, bytes) else json.dumps(record).encode()
            file.write(line + b"\n")
    return path


def data_config(root: Path, tokenizer: Path, **sources: SourceConfig) -> DataConfig:
    """A data configuration with small shards."""
    return DataConfig(root=str(root), tokenizer=str(tokenizer), sources=sources, shard_bytes=40_000)
