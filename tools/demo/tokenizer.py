"""The demo's tokenizer: byte-fallback BPE in the manner of EuroLLM's, trained on the demo's text.

Spaces become U+2581 and every word takes the one before it along; punctuation stands alone; a line
feed is a token of its own, so that the text after a picture is cut the same way everywhere.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as bpe_trainers

from conf.schema.model import ModelConfig

# In EuroLLM's order: ids 0 to 4.
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
IMAGE = "<image>"
# ChatML. BOS is written here and by no post-processor, so that it is there exactly once however
# the prompt is made; content may be a string or a list of parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPACE = "\u2581"


def _pipeline(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(rf"{_SPACE}?[^{_SPACE}\s\p{{P}}]+|[\s\S]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def train_tokenizer(texts: Iterable[str], pieces: int) -> Tokenizer:
    """A tokenizer of `pieces` entries (special tokens and the 256 bytes included) and `<image>`,
    whose id is `pieces`.

    Raises ValueError when the texts do not give that many pieces.
    """
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    _pipeline(learner)
    learner.train_from_iterator(
        texts,
        bpe_trainers.BpeTrainer(
            vocab_size=pieces,
            min_frequency=2,
            special_tokens=first,
            initial_alphabet=["\n"],
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    if len(learnt["vocab"]) != pieces:
        raise ValueError(
            f"the demo's text gives {len(learnt['vocab'])} pieces, not {pieces}; set "
            "model.image_token_id to that many"
        )
    # A second tokenizer around what was learnt: there the bytes are pieces, not special tokens.
    tokenizer = Tokenizer(
        models.BPE(
            vocab=learnt["vocab"],
            merges=[tuple(pair) for pair in learnt["merges"]],
            unk_token=SPECIAL[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    _pipeline(tokenizer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, IMAGE)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, model: ModelConfig) -> None:
    """A tokenizer directory as transformers 4.57.6 writes it.

    Raises ValueError when the model's table or image token does not go with the tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    image_id = tokenizer.token_to_id(IMAGE)
    if image_id != model.image_token_id or tokenizer.get_vocab_size() > model.text.vocab_size:
        raise ValueError(
            f"{IMAGE} is {image_id} of {tokenizer.get_vocab_size()} tokens, which does not fit "
            f"model.image_token_id={model.image_token_id} and "
            f"model.text.vocab_size={model.text.vocab_size}; change these two"
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
        # Without this, 4.57.6 emits token_type_ids, which `generate` refuses.
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        model_max_length=model.text.max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
