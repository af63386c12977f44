"""Rows of any layout in common use, as one: chat messages, images in the order of their
placeholders, and for a pair the two answers. `parse_sample` checks what comes out.

What is done to a row, and nothing else:
- `messages` are kept in their form, string or list content.
- Other layouts get list content wherever a message holds an image: each "<image>" in a human turn
  becomes an image item (with the newline that LLaVA writes after it). Elsewhere text stays text.
- Images that no turn marks are put before the first question, as InternVL (internvl_chat_dpo.py)
  and nanoVLM (data/datasets.py) do.
- LLaVA conversations that open with an answer lose that answer, as in LLaVA's own preprocess_v1.
- A caption is asked for by one of the prompts; which one depends on the row's number alone.

Boxes of grounding data are part of the text and pass through as they are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeGuard

from conf.schema.data import SourceConfig
from data_shards.layout_columns import CHATS, Columns, LayoutError, Rules, find
from data_shards.layout_turns import (
    CONVERTERS,
    Message,
    draw_prompt,
    mark_images,
    of_pairs,
    of_question,
    shape_of,
    shared_prompt,
    take_images,
)
from data_shards.sample import SampleError
from data_shards.sources import json_text
from data_shards.sources.rows import SourceRow, read_image

_NUMBER = re.compile("([0-9]+)")
MAX_LICENCE = 200  # characters
MAX_IMAGES = 256  # of one sample; more would be read before anything is checked
MAX_BYTES = 1 << 30  # of all images of one sample


@dataclass(frozen=True)
class Fields:
    """What a row holds; `messages`, `chosen` and `rejected` are yet to be checked.

    Attributes:
        images: encoded, in the order of their placeholders.
        chosen, rejected: text or a list of one message; None unless the row is a pair.
        licence: of the row, or of its source.
        layout: which one it was.
    """

    messages: list[Message]
    images: list[bytes]
    chosen: Any
    rejected: Any
    licence: str
    layout: str


@dataclass(frozen=True)
class Chat:
    """As `Fields`, with `references` for images: bytes, paths, or structs of them."""

    messages: list[Message]
    references: list[Any]
    chosen: Any
    rejected: Any
    licence: str | None
    layout: str


def to_fields(row: SourceRow, source: SourceConfig) -> Fields:
    """What one row of a source holds.

    Raises:
        SampleError: the row could not be read, fits no layout, or names images that cannot be read.
    """
    if row.problem is not None:
        raise SampleError(row.problem)
    chat = read_chat(row.values, Rules.of(source), row.number, len(row.attached))
    if len(chat.references) > MAX_IMAGES:
        raise SampleError(f"{len(chat.references)} images, more than {MAX_IMAGES}")
    if row.attached:
        names = [name for name, _ in row.attached]
        order = member_order(chat.references, names)
        images = [row.attached[number][1] for number in order]
    else:
        images, size = [], 0
        for number, reference in enumerate(chat.references):
            images.append(read_image(reference, row.folder, f"image {number}"))
            size += len(images[-1])
            if size > MAX_BYTES:
                raise SampleError(f"its images have over {MAX_BYTES} bytes")
    licence = chat.licence or source.licence
    return Fields(chat.messages, images, chat.chosen, chat.rejected, licence, chat.layout)


def record_messages(
    record: Any, rules: Rules, number: int, n_images: int
) -> tuple[list[Message], Any, Any]:
    """(messages, chosen, rejected) of the JSON member of a foreign shard.

    Args:
        number: what decides the prompt of a caption; the same whenever the sample is read.
        n_images: image members of the sample.

    Raises:
        SampleError: the record fits no layout.
    """
    chat = read_chat(record, rules, number, n_images)
    return chat.messages, chat.chosen, chat.rejected


def member_order(references: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Which member of a WebDataset sample each image placeholder shows.

    Args:
        references: what the record says of its images; may be empty.
        names: of the image members, in the order of the archive.

    Returns:
        Indices into `names`: as named, or where nothing is named in the natural order of the names.

    Raises:
        SampleError: several images, and the record's names are not those of the members.
    """
    natural = sorted(range(len(names)), key=lambda n: _natural(names[n]))
    if not references or len(references) == len(names) == 1:
        return natural
    wanted = [_file_name(reference) for reference in references]
    if None in wanted:
        raise SampleError("its record holds images, and so does the archive beside it")
    ends: dict[str, int] = {}
    for number, name in enumerate(names):
        base = PurePosixPath(name).name
        ends[base] = ends[base.partition(".")[2]] = number
    order = [ends.get(name, -1) for name in wanted if name is not None]
    if -1 in order or len(set(order)) != len(names) or len(order) != len(names):
        shown = ", ".join(str(name) for name in wanted[:4])
        raise SampleError(
            f"its record names images {shown}, the archive has {', '.join(names[:4])} beside it: "
            "which is which is not said"
        )
    return order


def read_chat(record: Any, rules: Rules, number: int, attached: int = 0) -> Chat:
    """One row's chat.

    Args:
        record: column to value.
        attached: images that come beside the record, not in it.

    Raises:
        SampleError: the row fits no layout.
    """
    if not isinstance(record, Mapping):
        raise SampleError(f"the record is {type(record).__name__}, not a mapping")
    try:
        columns = find(record.keys(), rules, whole=False, beside=attached > 0)
    except LayoutError as error:
        raise SampleError(str(error)) from None
    column = _images(columns.value(record, "images"))
    chosen = rejected = None
    if rules.preference:
        chosen = _answer(columns.value(record, "chosen"))
        rejected = _answer(columns.value(record, "rejected"))
    layout = columns.layout
    if _is_whole(chosen) and _is_whole(rejected):
        messages, chosen, rejected = shared_prompt(chosen, rejected)
    elif layout in CHATS:
        turns = _list(columns.value(record, "messages"), columns.of["messages"])
        layout = shape_of(turns, layout) if rules.layout == "auto" else layout
        messages = CONVERTERS[layout](turns)
    elif layout == "caption":
        caption = columns.value(record, "caption")
        messages = of_pairs([("user", draw_prompt(rules.prompts, number)), ("assistant", caption)])
    else:
        messages = of_question(columns.value(record, "question"))
        if not rules.preference:
            messages.append({"role": "assistant", "content": columns.value(record, "answer")})
    messages, named = take_images(messages)
    references = _merge(named, column)
    if not named:
        messages = mark_images(messages, len(references) or attached)
    licence = _licence(columns.value(record, "licence"))
    return Chat(messages, references, chosen, rejected, licence, layout)


def _answer(value: Any) -> Any:
    """Text, or a list of messages; a single message (LLaMA-Factory's pairs) becomes a list."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    if "value" in value and "content" not in value:
        return value["value"]
    return [value]


def _is_whole(answer: Any) -> TypeGuard[list[Any]]:
    """Whether an answer of a pair is the whole conversation, its question included."""
    return isinstance(answer, list) and len(answer) > 1


def _merge(named: list[Any], column: list[Any]) -> list[Any]:
    """References in the order of the placeholders, from the items or from the column."""
    from_items = [reference for reference in named if reference is not None]
    if not from_items:
        return column
    if len(from_items) < len(named):
        raise SampleError("some image items name their image and others do not")
    if column and len(column) != len(from_items):
        raise SampleError(
            f"{len(from_items)} images named in messages, but {len(column)} in the image column"
        )
    return from_items


def _images(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _list(value: Any, name: str) -> list[Any]:
    """A list of turns; JSON text is accepted for one."""
    if isinstance(value, str):
        try:
            value = json_text.parse(value)
        except ValueError as error:
            raise SampleError(f"{name} is text, but {error}") from None
    if not isinstance(value, (list, tuple)):
        raise SampleError(f"{name} is {type(value).__name__}, not a list")
    return list(value)


def _licence(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_LICENCE:
        raise SampleError(f"the licence is not one line of at most {MAX_LICENCE} characters")
    return value


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers within names by size: 2.jpg before 10.jpg."""
    parts = _NUMBER.split(name)  # text and digits in turn
    digits = [part.lstrip("0") if n % 2 else part for n, part in enumerate(parts)]
    return [(len(part) if n % 2 else 0, part) for n, part in enumerate(digits)]


def _file_name(reference: Any) -> str | None:
    if isinstance(reference, Mapping):
        reference = reference.get("path") if not reference.get("bytes") else None
    return PurePosixPath(reference).name if isinstance(reference, str) and reference else None


__all__ = [
    "Chat",
    "Columns",
    "Fields",
    "Rules",
    "member_order",
    "read_chat",
    "record_messages",
    "to_fields",
]
