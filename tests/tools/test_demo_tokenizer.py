"""The demo's tokenizer in transformers and in the data path."""

import numpy as np
import pytest

from conf.compose import compose
from data_shards.chat import ChatTokenizer
from tools.demo import language
from tools.demo.canvases import COLOURS
from tools.demo.corpus import corpus
from tools.demo.language import NUMBERS
from tools.demo.sources import chat, training_rows
from tools.demo.tokenizer import SPECIAL, save_tokenizer, train_tokenizer

MODEL = compose(["model=tiny"]).model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(corpus(), MODEL.image_token_id), path, MODEL)
    return path


@pytest.fixture(scope="module")
def theirs(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="module")
def ours(directory):
    return ChatTokenizer.from_directory(directory)


def test_ids_are_those_of_the_model(theirs, ours):
    assert theirs.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert theirs.image_token_id == theirs.convert_tokens_to_ids("<image>") == 768
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 4, 2)
    assert len(theirs) == 769
    ours.require_model(MODEL)


def test_no_token_type_ids_and_no_automatic_bos(theirs):
    encoded = theirs("Olá!")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert 1 not in encoded["input_ids"]


def test_round_trip(theirs):
    texts = ["", " ", "a  b", "\n\nQue?", "ção 🎉\tônibus 日本", "lê-se: sete, três.", "\u2581"]
    texts += [
        message["content"]
        for source in ("vqa", "text", "style")
        for row in training_rows(source, 60, 0)
        for message in row["messages"]
        if "<image>" not in message["content"]
    ]
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert 0 not in ids
        assert theirs.decode(ids) == text.replace("\u2581", " ")


def test_number_and_colour_words_are_single_tokens(theirs):
    for word in (*NUMBERS, *COLOURS, "nada"):
        assert len(theirs.tokenize(f" {word}")) == 1, word
        assert theirs.tokenize(f"e {word}, fim")[1] == "\u2581" + word


def test_line_feed_stands_alone(theirs):
    for text in ("\nQue algarismos", "user\nOlá", "a\n\nb", "\n "):
        pieces = theirs.tokenize(text)
        assert pieces.count("\n") == text.count("\n")
        assert all(piece == "\n" or "\n" not in piece for piece in pieces)


def test_most_words_are_whole(theirs):
    frames = [w for kind in language.QUESTIONS.values() for w in kind]
    words = [word for w in frames for word in w.question.rstrip("?.").split()[1:]]
    assert np.mean([len(theirs.tokenize(" " + word)) for word in words]) < 1.5


@pytest.mark.parametrize("as_list", [False, True])
def test_template_has_one_bos_and_one_prompt_for_both_contents(theirs, ours, as_list):
    question = "O que está escrito?"
    if as_list:
        content = [{"type": "image"}, {"type": "text", "text": question}]
    else:
        content = f"<image>\n{question}"
    messages = [{"role": "user", "content": content}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<s><|im_start|>user\n<image>\nO que está escrito?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.count(1) == 1 and ids.count(768) == 1
    assert theirs(text)["input_ids"] == ids  # as lmms-eval and the processor do it
    assert ours.encode_prompt(messages, [1]).tolist() == ids


def test_training_tokens_are_those_of_transformers(theirs, ours):
    for row in [*training_rows("vqa", 20, 0), *training_rows("text", 20, 0)]:
        encoded = ours.encode(row["messages"], [1] * len(row["images"]))
        whole = theirs.apply_chat_template(row["messages"])
        assert encoded.ids.tolist() == whole[:-1]  # the line feed after the last answer
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert theirs.decode(encoded.ids[encoded.targets]) == "".join(
            answer + "<|im_end|>" for answer in answers
        )


def test_same_tokenizer_every_time(directory, tmp_path):
    save_tokenizer(train_tokenizer(corpus(), MODEL.image_token_id), tmp_path, MODEL)
    for path in directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_too_many_pieces_are_refused():
    with pytest.raises(ValueError, match="model.image_token_id"):
        train_tokenizer(corpus(), 50_000)


def test_model_that_does_not_fit_is_refused(tmp_path):
    model = compose(["model=tiny", "model.image_token_id=700"]).model
    with pytest.raises(ValueError, match="model.image_token_id=700"):
        save_tokenizer(train_tokenizer(corpus(), 768), tmp_path, model)


def test_cached_turns_are_the_chat(ours):
    from tools.demo.text_grids import TurnTokens

    tokens = TurnTokens(ours)
    turns = [("Olá!", "Olá! Em que posso ajudar?"), ("De que cor é o fundo?", "O fundo é azul.")]
    for with_image in (False, True):
        words = np.array([50, 60, 70]) if with_image else None
        document = tokens.document(turns, words)
        encoded = ours.encode(chat(turns, with_image), [3] if with_image else [])
        expected = np.where(encoded.ids == 768, 0, encoded.ids)
        got = document.ids.copy()
        if with_image:
            start = int(encoded.image_starts[0])
            assert got[start : start + 3].tolist() == [50, 60, 70]
            got[start : start + 3] = 0
        assert got.tolist() == expected.tolist()
        assert document.targets.tolist() == encoded.targets.tolist()
