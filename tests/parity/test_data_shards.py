"""Tokens and pixels of data_shards against transformers 4.57.6's LlavaNextProcessor."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from conf.schema.data import ImageLimits  # noqa: E402
from data_shards import images, resize  # noqa: E402
from data_shards.chat import ChatTokenizer  # noqa: E402
from data_shards.image_store import store  # noqa: E402
from models.anyres import AnyresGeometry, pinpoints_up_to  # noqa: E402
from tests.data_shards import toys  # noqa: E402


def image_processor(geometry: AnyresGeometry) -> "transformers.LlavaNextImageProcessor":
    from transformers import LlavaNextImageProcessor

    return LlavaNextImageProcessor(
        size={"shortest_edge": geometry.tile},
        crop_size={"height": geometry.tile, "width": geometry.tile},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in geometry.pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )


def normalised(tiles_NCHW: np.ndarray) -> np.ndarray:
    """What the model is fed: x/255 in double precision, then (x - 0.5) / 0.5 in single."""
    scaled = (tiles_NCHW.astype(np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


def sizes() -> list[tuple[int, int]]:
    generator = np.random.default_rng(7)
    random = [tuple(map(int, generator.integers(4, 300, 2))) for _ in range(40)]
    odd = [(4, 4), (5, 280), (280, 5), (32, 32), (31, 33), (64, 32), (33, 97), (128, 128), (7, 9)]
    # Tall enough that Pillow 13 resizes vertically first.
    return [*odd, (400, 90), (90, 400), *random]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "grey"])
def test_tiles_equal_the_slow_processor(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = AnyresGeometry(tile=32, patch=8, pinpoints=pinpoints_up_to(32, 6))
    processor = image_processor(geometry)
    limits = ImageLimits(min_side=4, max_aspect=60)
    for seed, (height, width) in enumerate(sizes()):
        picture = toys.picture(seed, height, width)
        if form == "grey":
            picture = picture.convert("L")
        stored = store(toys.encoded(picture, "JPEG" if form == "JPEG" else "PNG"), limits)
        theirs = processor(Image.open(io.BytesIO(stored.data)), return_tensors="np")
        assert tuple(theirs["image_sizes"][0]) == (stored.height, stored.width) == (height, width)
        mine = images.tiles(images.decode(stored.data, height * width), geometry)
        assert np.array_equal(normalised(mine), theirs["pixel_values"][0]), (height, width)
        for backend in resize.backends():
            monkeypatch.setenv(resize.VARIABLE, backend)
            loaded = np.full_like(mine, 77)
            images.write_tiles_from(stored.data, height, width, geometry, loaded)
            assert np.array_equal(loaded, mine), (backend, height, width)


def test_tiles_equal_the_slow_processor_at_384() -> None:
    geometry = AnyresGeometry(tile=384, patch=16, pinpoints=pinpoints_up_to(384, 12))
    picture = toys.picture(1, 700, 1001)
    theirs = image_processor(geometry)(picture, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(normalised(images.tiles(picture, geometry)), theirs)


def processor_of(directory: Path) -> "transformers.LlavaNextProcessor":
    from transformers import LlavaNextProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return LlavaNextProcessor(
        image_processor=image_processor(toys.GEOMETRY),
        tokenizer=tokenizer,
        patch_size=toys.GEOMETRY.patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=toys.TEMPLATE,
    )


CONVERSATIONS: list[list[dict]] = [
    [{"role": "user", "content": "Quanto é dois e dois?"}],
    [{"role": "user", "content": "<image>\nQue é isto?"}],
    [
        {"role": "system", "content": "És um assistente prestável."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Que cor é?"}]},
    ],
    [{"role": "user", "content": "<image> e\n<image>\n\n  Compara-as. Ç ã õ 漢字 🙂"}],
    [{"role": "user", "content": [{"type": "text", "text": "Espaços   e\ttabulações\n\n\n"}]}],
]
MULTI_TURN: list[list[dict]] = [
    [
        {"role": "user", "content": "<image>\nQuantos são?"},
        {"role": "assistant", "content": "três."},
        {"role": "user", "content": "E a soma?"},
        {"role": "assistant", "content": "nove."},
        {"role": "user", "content": "Porquê?"},
    ],
]


def pictures(messages: list[dict]) -> list[Image.Image]:
    count = sum(
        message["content"].count("<image>")
        if isinstance(message["content"], str)
        else sum(item["type"] == "image" for item in message["content"])
        for message in messages
    )
    return [toys.picture(n, *toys.SIZES[n]) for n in range(count)]


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_prompt_ids_equal_the_processor(kind: str, tmp_path: Path) -> None:
    directory = toys.write_tokenizer(tmp_path, kind)
    processor, mine = processor_of(directory), ChatTokenizer.from_directory(directory)
    for messages in CONVERSATIONS + MULTI_TURN:
        shown = pictures(messages)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        theirs = processor(images=shown or None, text=text)["input_ids"][0]
        image_tokens = [toys.GEOMETRY.n_tokens(p.height, p.width) for p in shown]
        assert mine.encode_prompt(messages, image_tokens).tolist() == theirs


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_a_turn_is_prompt_then_answer_as_transformers_would_generate(
    kind: str, tmp_path: Path
) -> None:
    directory = toys.write_tokenizer(tmp_path, kind)
    processor, mine = processor_of(directory), ChatTokenizer.from_directory(directory)
    messages = CONVERSATIONS[1]
    answer = "\nQue estranho: três, <s> & ç."
    shown = pictures(messages)
    image_tokens = [toys.GEOMETRY.n_tokens(p.height, p.width) for p in shown]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    prompt = processor(images=shown, text=text)["input_ids"][0]
    whole = [*messages, {"role": "assistant", "content": answer}]
    encoded = mine.encode(whole, image_tokens)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.targets.tolist() == [False] * len(prompt) + [True] * (
        len(encoded.ids) - len(prompt)
    )
    written = encoded.ids[encoded.targets]
    assert written[-1] == mine.end_id and mine.end_id not in written[:-1]
    tokenizer = processor.tokenizer
    assert tokenizer.decode(written[:-1], skip_special_tokens=False) == answer
    assert not set(written[:-1].tolist()) & set(tokenizer.all_special_ids)


def test_apply_chat_template_text_is_the_same(tmp_path: Path) -> None:
    directory = toys.write_tokenizer(tmp_path)
    processor, mine = processor_of(directory), ChatTokenizer.from_directory(directory)
    for messages in CONVERSATIONS + MULTI_TURN:
        for prompt in (True, False):
            theirs = processor.apply_chat_template(messages, add_generation_prompt=prompt)
            assert mine._template.render(messages, prompt) == theirs


@pytest.mark.parametrize("bos_in_template", [True, False])
def test_one_bos_when_the_tokenizer_adds_it_too(bos_in_template: bool, tmp_path: Path) -> None:
    """EuroLLM's tokenizer adds BOS by itself; with or without one in the template there is one."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    template = toys.TEMPLATE if bos_in_template else toys.TEMPLATE.replace("{{- bos_token -}}", "")
    directory = toys.write_tokenizer(tmp_path, "fallback", template)
    inner = Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(directory / "tokenizer.json"))
    processor, mine = processor_of(directory), ChatTokenizer.from_directory(directory)
    processor.chat_template = template
    messages = CONVERSATIONS[4]
    theirs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert mine.encode_prompt(messages).tolist() == list(theirs)
    assert list(theirs).count(1) == 1
