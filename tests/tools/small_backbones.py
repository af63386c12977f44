"""Random SigLIP and Llama checkpoints and a tokenizer, as transformers 4.57.6 saves them."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IMAGE_ID = 300
# Hydra overrides that describe the models below.
OVERRIDES = [
    "model=tiny",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=48",
    "model.vision.layers=3",
    "model.text.hidden_size=32",
    "model.text.intermediate_size=40",
    "model.text.layers=4",
    "model.text.head_dim=8",
    "model.text.vocab_size=320",
    "model.text.max_positions=512",
    f"model.image_token_id={IMAGE_ID}",
]


def write_tokenizer(directory: Path, with_image: bool = True, automatic_bos: bool = False) -> None:
    """A byte-level BPE of 300 tokens, `<image>` being number 300."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=IMAGE_ID,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Que algarismos estão na imagem, da esquerda para a direita? Está um sete, dois e três."
    words = [f"{text} {number} {chr(97 + number % 26)}o{number % 7}" for number in range(200)]
    tokenizer.train_from_iterator(words, trainer)
    assert tokenizer.get_vocab_size() == IMAGE_ID
    if with_image:
        tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    if automatic_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = TEMPLATE.replace("{{ bos_token }}", "") if automatic_bos else TEMPLATE
    fast.save_pretrained(directory)


def write_backbones(directory: Path) -> tuple[Path, Path, Path]:
    """(vision, language, tokenizer) directories under `directory`."""
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    vision_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    vision = SiglipVisionModel(vision_config)
    text_config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=IMAGE_ID,  # smaller than the table: import grows it
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    language = LlamaForCausalLM(text_config)
    for network in (vision, language):
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    paths = directory / "vision", directory / "language", directory / "tokenizer"
    vision.save_pretrained(paths[0])
    language.save_pretrained(paths[1])
    write_tokenizer(paths[2])
    return paths


def picture(width: int, height: int) -> bytes:
    """A PNG of random pixels, the same for the same size."""
    pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
