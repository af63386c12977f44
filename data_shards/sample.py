"""One training sample: chat messages, images, optionally a chosen and a rejected answer.

`parse_sample` turns a row of a source into a checked `Sample`; nothing later repairs anything.
Messages are kept in the form they came in (string or list content), because chat templates may
render the two differently. In string content "<image>" marks an image; in list content an image
is {"type": "image"}, and any "<image>" in its text is ordinary text.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")
# Put inside literal special tokens (see data_shards/chat.py); a Unicode noncharacter, which no
# text may contain, so it is refused in input.
DEFUSE = "\ufdd0"

MAX_MESSAGES = 1024  # rendering a conversation takes time with the square of its turns
MAX_CHARACTERS = 1 << 20  # of one text
# Composing marks takes time with the square of those in a row; texts have a handful (30 is the
# limit of UAX #15's Stream-Safe Text Format).
MAX_MARKS = 30

_SURROGATE = re.compile("[\ud800-\udfff]")
_MANY_ODD = re.compile(f"[^\x00-\x7f]{{{MAX_MARKS + 1},}}")
# Blank, but not spaces to Unicode: Braille without dots, and the fillers of Hangul.
_BLANK = "\u2800\u115f\u1160\u3164\uffa0"


class SampleError(ValueError):
    """A sample that cannot be trained on; the message is the reason, for the quarantine file."""


@dataclass(frozen=True)
class Sample:
    """A checked sample.

    Attributes:
        key: unique in its data set, no dot or slash (WebDataset splits names at the first dot).
        messages: {"role", "content"}; content is a string, or a list of {"type": "image"} and
            {"type": "text", "text": ...}. Ends with an assistant message, or for a preference
            pair with a user message.
        images: encoded image files, in the order of their placeholders.
        chosen, rejected: the two assistant answers of a preference pair, else None.
        source, licence, origin: name of the source, its licence, "file:row" it came from.
    """

    key: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[bytes, ...]
    chosen: str | None
    rejected: str | None
    source: str
    licence: str
    origin: str

    @property
    def is_pair(self) -> bool:
        """Whether this is a preference pair."""
        return self.chosen is not None

    def answers(self) -> list[str]:
        """Every text that is trained on."""
        if self.chosen is not None and self.rejected is not None:
            return [self.chosen, self.rejected]
        return [text_of(m["content"]) for m in self.messages if m["role"] == "assistant"]

    def to_json(self) -> bytes:
        """The `.json` member of a shard, UTF-8; images are members of their own."""
        record: dict[str, Any] = {"messages": list(self.messages)}
        if self.is_pair:
            record["chosen"], record["rejected"] = self.chosen, self.rejected
        record.update(source=self.source, licence=self.licence, origin=self.origin)
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def parse_sample(
    row: Mapping[str, Any],
    images: Sequence[bytes],
    *,
    key: str,
    source: str,
    licence: str,
    origin: str,
    preference: bool,
) -> Sample:
    """Check one source row (`messages`, and for a pair `chosen` and `rejected`).

    Raises:
        SampleError: whatever is wrong with it, in words for the quarantine file.
    """
    given = _list(row.get("messages"), "messages")
    if len(given) > MAX_MESSAGES:
        raise SampleError(f"{len(given)} messages, more than {MAX_MESSAGES}")
    messages = tuple(_message(m, n) for n, m in enumerate(given))
    _check_turns(messages, preference)
    marks = count_images(messages)
    if marks != len(images):
        raise SampleError(
            f"{marks} image placeholders but {len(images)} images (in string content every "
            f"{IMAGE_MARK} is a placeholder; write list content to keep it as text)"
        )
    chosen = rejected = None
    if preference:
        chosen, rejected = (
            _answer(row.get("chosen"), "chosen"),
            _answer(row.get("rejected"), "rejected"),
        )
        if chosen.strip() == rejected.strip():
            raise SampleError("chosen and rejected are the same text")
    return Sample(key, messages, tuple(images), chosen, rejected, source, licence, origin)


def record_messages(record: Any) -> tuple[list[dict[str, Any]], str | None, str | None]:
    """(messages, chosen, rejected) of a parsed `.json` member.

    Raises:
        SampleError: the member is not what `Sample.to_json` writes.
    """
    try:
        messages = [
            {"role": str(message["role"]), "content": message["content"]}
            for message in record["messages"]
        ]
        return messages, record.get("chosen"), record.get("rejected")
    except (KeyError, TypeError, AttributeError) as error:
        raise SampleError(f"not a sample record ({error!r})") from None


def text_of(content: str | list[dict[str, str]]) -> str:
    """The text of a message, image items left out."""
    if isinstance(content, str):
        return content
    return "".join(item["text"] for item in content if item["type"] == "text")


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    """Image placeholders of user messages; elsewhere "<image>" is text."""
    total = 0
    for message in messages:
        content = message["content"]
        if message["role"] != "user":
            continue
        if isinstance(content, str):
            total += content.count(IMAGE_MARK)
        else:
            total += sum(item["type"] == "image" for item in content)
    return total


def clean_text(value: Any, where: str) -> str:
    """`value` as NFC text; SampleError on what no tokenizer should see."""
    if not isinstance(value, str):
        raise SampleError(f"{where} is {type(value).__name__}, not text")
    if "\0" in value:
        raise SampleError(f"{where} contains a NUL character")
    if DEFUSE in value:
        raise SampleError(f"{where} contains the noncharacter U+FDD0")
    if _SURROGATE.search(value):
        raise SampleError(f"{where} contains a lone surrogate")
    if len(value) > MAX_CHARACTERS:
        raise SampleError(f"{where} has {len(value)} characters, more than {MAX_CHARACTERS}")
    for run in _MANY_ODD.findall(value):
        marks = 0
        for character in run:
            marks = marks + 1 if unicodedata.combining(character) else 0
            if marks > MAX_MARKS:
                raise SampleError(f"{where} has over {MAX_MARKS} combining marks in a row")
    return unicodedata.normalize("NFC", value)


def is_blank(text: str) -> bool:
    """Whether nobody sees anything of it: spaces, controls, joiners and the like."""
    if text.isascii():
        return not any(character.isprintable() and character != " " for character in text)
    return all(
        character.isspace()
        or character in _BLANK
        or unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co")
        for character in text
    )


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise SampleError(f"{where} is {type(value).__name__}, not a list")
    return list(value)


def _message(message: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise SampleError(f"{where} is {type(message).__name__}, not a mapping")
    role = message.get("role")
    if role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else type(role).__name__
        raise SampleError(f"{where} has role {shown}, none of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": role, "content": clean_text(content, where)}
    items: list[dict[str, str]] = []
    for item in _list(content, f"content of {where}"):
        item = _item(item, where)
        if items and item["type"] == items[-1]["type"] == "text":
            # Two texts could otherwise meet in the prompt and spell a control token.
            items[-1] = {"type": "text", "text": items[-1]["text"] + item["text"]}
        else:
            items.append(item)
    if role != "user" and any(item["type"] == "image" for item in items):
        raise SampleError(f"{where} ({role}) holds an image; only user messages may")
    return {"role": role, "content": items}


def _item(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, Mapping) or item.get("type") not in ("image", "text"):
        raise SampleError(f"{where} has a content item that is neither image nor text")
    if item["type"] == "image":
        return {"type": "image"}
    return {"type": "text", "text": clean_text(item.get("text"), where)}


def _answer(value: Any, where: str) -> str:
    """Accepts text, or the one-message list of conversational preference data."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1 or not isinstance(value[0], Mapping):
            raise SampleError(f"{where} is not one assistant message")
        message = _message(value[0], 0)
        if message["role"] != "assistant":
            raise SampleError(f"{where} has role {message['role']!r}, not assistant")
        value = text_of(message["content"])
    text = clean_text(value, where)
    if is_blank(text):
        raise SampleError(f"{where} is empty")
    return text


def _check_turns(messages: Sequence[Mapping[str, Any]], preference: bool) -> None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise SampleError(
                f"roles do not alternate: turn {number} is {message['role']}, not {expected}"
            )
        blank = is_blank(text_of(message["content"]))
        if expected == "assistant" and blank:
            raise SampleError(f"the answer of turn {number} is empty")
        if expected == "user" and blank and not count_images([message]):
            raise SampleError(f"the question of turn {number} is empty")
    last = turns[-1]["role"] if turns else "nothing"
    wanted = "user" if preference else "assistant"
    if last != wanted:
        raise SampleError(
            f"messages end with {last}, not {wanted}"
            + (" (chosen and rejected follow it)" if preference else "")
        )
