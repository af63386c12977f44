"""The sample schema: what is accepted, what is refused, and with which words."""

import json

import pytest

from data_shards.sample import Sample, SampleError, parse_sample, record_messages

USER = {"role": "user", "content": "Olá"}
ANSWER = {"role": "assistant", "content": "Bom dia."}
SYSTEM = {"role": "system", "content": "És prestável."}


def parse(messages: object, images: int = 0, **fields: object) -> Sample:
    return parse_sample(
        {"messages": messages, **fields},
        [b"x"] * images,
        key="000000001",
        source="s",
        licence="CC0",
        origin="f:1",
        preference="chosen" in fields,
    )


def test_a_good_sample_survives_the_round_trip() -> None:
    content = [{"type": "text", "text": "Isto "}, {"type": "image"}, {"type": "text", "text": "?"}]
    sample = parse([SYSTEM, {"role": "user", "content": content}, ANSWER], images=1)
    messages, chosen, rejected = record_messages(json.loads(sample.to_json()))
    assert (
        messages == list(sample.messages) == [SYSTEM, {"role": "user", "content": content}, ANSWER]
    )
    assert chosen is None and rejected is None and not sample.is_pair


def test_text_becomes_nfc() -> None:
    sample = parse([{"role": "user", "content": "a\u0303"}, ANSWER])
    assert sample.messages[0]["content"] == "ã"


def test_marks_in_a_row_cost_no_time() -> None:
    """Composing a hundred thousand of them would take minutes; short rows are text as any other."""
    content = "e" + "\u0301\u0323" * 15
    sample = parse([{"role": "user", "content": content + " 東京都" * 40}, ANSWER])
    assert sample.messages[0]["content"].startswith("\u1eb9\u0323")
    with pytest.raises(SampleError, match="over 30 combining marks in a row"):
        parse([{"role": "user", "content": "x" + "\u0300\u0316" * 400_000}, ANSWER])


def test_a_picture_alone_is_a_question() -> None:
    for content in ("<image>", [{"type": "image"}]):
        parse([{"role": "user", "content": content}, ANSWER], images=1)


def test_null_fields_of_parquet_structs_are_ignored() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "Que é?"}]
    sample = parse([{"role": "user", "content": content}, ANSWER], images=1)
    assert sample.messages[0]["content"][0] == {"type": "image"}


def test_neighbouring_texts_are_joined_so_that_they_cannot_spell_a_token() -> None:
    content = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    sample = parse([{"role": "user", "content": content}, ANSWER])
    assert sample.messages[0]["content"] == [{"type": "text", "text": "<|im_end|>"}]


def test_a_pair_ends_with_the_question_and_takes_both_forms_of_answers() -> None:
    sample = parse(
        [USER], chosen="Autocarro.", rejected=[{"role": "assistant", "content": "Ônibus."}]
    )
    assert (sample.chosen, sample.rejected) == ("Autocarro.", "Ônibus.")
    assert sample.answers() == ["Autocarro.", "Ônibus."]


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ("oi", 0, "not a list"),
        ([], 0, "end with nothing"),
        ([USER], 0, "end with user"),
        ([ANSWER], 0, "turn 0 is assistant"),
        ([USER, USER], 0, "do not alternate"),
        ([USER, ANSWER, SYSTEM], 0, "do not alternate"),
        ([{"role": "tool", "content": "x"}], 0, "none of system"),
        ([USER, {"role": "assistant", "content": " \n"}], 0, "answer of turn 1 is empty"),
        ([{"role": "user", "content": ""}, ANSWER], 0, "question of turn 0 is empty"),
        ([{"role": "user", "content": " \n\t"}, ANSWER], 0, "question of turn 0 is empty"),
        ([{"role": "user", "content": []}, ANSWER], 0, "question of turn 0 is empty"),
        ([USER, {"role": "assistant", "content": []}], 0, "answer of turn 1 is empty"),
        ([USER, {"role": "assistant", "content": "\u200b\ufeff\u00a0\u3164"}], 0, "is empty"),
        ([{"role": ["user"], "content": "x"}, ANSWER], 0, "role list, none of"),
        ([{"role": "u" * 99, "content": "x"}, ANSWER], 0, "role 'u{40}', none of"),
        ([USER, ANSWER] * 513, 0, "1026 messages, more than 1024"),
        ([{"role": "user", "content": "a" * (1 << 20) + "b"}, ANSWER], 0, "1048577 characters"),
        ([{"role": "user", "content": "a" + "\u0300\u0316" * 16}, ANSWER], 0, "combining marks"),
        ([{"role": "user", "content": "a\0b"}, ANSWER], 0, "NUL"),
        ([{"role": "user", "content": "a\ud800"}, ANSWER], 0, "surrogate"),
        ([{"role": "user", "content": "a\ufdd0"}, ANSWER], 0, "noncharacter"),
        ([{"role": "user", "content": 3}, ANSWER], 0, "not a list"),
        ([{"role": "user", "content": [{"type": "video"}]}, ANSWER], 0, "neither image nor text"),
        ([{"role": "user", "content": [{"type": "text"}]}, ANSWER], 0, "not text"),
        ([USER, ANSWER], 1, "0 image placeholders but 1 images"),
        ([{"role": "user", "content": "<image> e <image>"}, ANSWER], 1, "2 image placeholders"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], 1, "only user messages"),
    ],
)
def test_bad_messages_are_refused(messages: object, images: int, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        parse(messages, images)


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ("", "b", "chosen is empty"),
        ("a", None, "rejected is NoneType"),
        ("a", "a", "same text"),
        ("a", " a\n", "same text"),
        ("\u200b", "a", "chosen is empty"),
        ("a", [USER], "not assistant"),
    ],
)
def test_bad_answers_of_pairs_are_refused(chosen: object, rejected: object, words: str) -> None:
    with pytest.raises(SampleError, match=words):
        parse([USER], chosen=chosen, rejected=rejected)


def test_the_mark_is_text_outside_user_strings() -> None:
    """An answer about HTML may say <image>; list content says images by type."""
    listed = [{"type": "text", "text": "O que é <image>?"}]
    parse([{"role": "user", "content": listed}, {"role": "assistant", "content": "<image> é."}])


def test_records_that_are_not_ours_are_refused() -> None:
    for record in (3, {}, {"messages": [{"role": "user"}]}, {"messages": None}):
        with pytest.raises(SampleError):
            record_messages(record)
