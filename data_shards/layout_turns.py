"""Turns of any layout as messages, with image items where images are marked."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from data_shards.sample import IMAGE_MARK, SampleError

_ROLES = {  # LLaVA's and ShareGPT's names
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IMAGE_KEYS = ("image", "image_url", "path", "url", "bytes")
Message = dict[str, Any]


def draw_prompt(prompts: Sequence[str], number: int) -> str:
    """One of the prompts, by the row's number alone: any process, any time, the same."""
    digest = blake2b(b"%d" % number, digest_size=8).digest()
    return prompts[int.from_bytes(digest, "big") % len(prompts)]


def shape_of(turns: Sequence[Any], otherwise: str) -> str:
    """The layout that the first turn shows."""
    first = turns[0] if turns else None
    if isinstance(first, Mapping):
        if "from" in first:
            return "conversations"
        if "role" in first:
            return "messages"
        if "user" in first:
            return "texts"
    return otherwise


def _messages(turns: Sequence[Any]) -> list[Message]:
    return [dict(_mapping(turn, n)) for n, turn in enumerate(turns)]


def _conversations(turns: Sequence[Any]) -> list[Message]:
    pairs = []
    for number, turn in enumerate(turns):
        said = str(_mapping(turn, number).get("from"))
        if said.lower() not in _ROLES:
            raise SampleError(f"turn {number} is from {said[:60]!r}, none of {', '.join(_ROLES)}")
        pairs.append((_ROLES[said.lower()], turn.get("value")))
    start = 1 if pairs and pairs[0][0] == "system" else 0
    if pairs[start:] and pairs[start][0] == "assistant":
        del pairs[start]
    return of_pairs(pairs)


def _texts(turns: Sequence[Any]) -> list[Message]:
    pairs = []
    for number, turn in enumerate(turns):
        for role in ("user", "assistant"):
            pairs.append((role, _mapping(turn, number).get(role)))
    return of_pairs(pairs)


CONVERTERS: dict[str, Callable[[Sequence[Any]], list[Message]]] = {
    "messages": _messages,
    "conversations": _conversations,
    "texts": _texts,
}


def of_pairs(pairs: Sequence[tuple[str, Any]]) -> list[Message]:
    """Messages; "<image>" in what a user says becomes an image item."""
    return [
        {"role": role, "content": _split(text) if role == "user" else text} for role, text in pairs
    ]


def _split(text: Any) -> Any:
    if not isinstance(text, str) or IMAGE_MARK not in text:
        return text
    content: list[dict[str, str]] = []
    for number, part in enumerate(text.split(IMAGE_MARK)):
        if number:
            content.append({"type": "image"})
            part = part.removeprefix("\n")
        if part:
            content.append({"type": "text", "text": part})
    return content


def of_question(value: Any) -> list[Message]:
    """A question as text, or as the messages before the answer."""
    if value is None:
        raise SampleError("it has no question")
    if isinstance(value, (list, tuple)):
        return _messages(value)  # TRL's conversational prompt
    return of_pairs([("user", value)])


def shared_prompt(
    chosen: list[Any], rejected: list[Any]
) -> tuple[list[Message], list[Any], list[Any]]:
    """TRL's pairs with an implicit prompt: what both conversations begin with."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    return _messages(chosen[:same]), chosen[same:], rejected[same:]


def take_images(messages: list[Message]) -> tuple[list[Message], list[Any]]:
    """Messages whose image items say no more than that, and what those items named (None where
    they named nothing)."""
    named: list[Any] = []
    taken = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            items = []
            for item in content:
                if isinstance(item, Mapping) and item.get("type") in ("image", "image_url"):
                    named.append(_named(item))
                    items.append({"type": "image"})
                else:
                    items.append(item)
            message = {**message, "content": items}
        taken.append(message)
    return taken, named


def _named(item: Mapping[str, Any]) -> Any:
    """What an image item names: OpenAI's image_url, Nemotron's and Qwen's image, or nothing."""
    value = next((item[key] for key in _IMAGE_KEYS if item.get(key)), None)
    if isinstance(value, Mapping):
        return value.get("bytes") or value.get("path") or value.get("url")
    return value


def mark_images(messages: list[Message], images: int) -> list[Message]:
    """Images that nothing marks go before the first question."""
    if not images or any(_is_marked(message) for message in messages):
        return messages
    for number, message in enumerate(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            text = message["content"]
            content = [{"type": "image"}] * images
            content += [{"type": "text", "text": text}] if text else []
            marked = {**message, "content": content}
            return [*messages[:number], marked, *messages[number + 1 :]]
    return messages


def _is_marked(message: Message) -> bool:
    """Whether a user message says where its images are, or is written so that it would."""
    content = message.get("content")
    if message.get("role") != "user":
        return False
    return isinstance(content, list) or (isinstance(content, str) and IMAGE_MARK in content)


def _mapping(turn: Any, number: int) -> Mapping[str, Any]:
    if not isinstance(turn, Mapping):
        raise SampleError(f"turn {number} is {type(turn).__name__}, not a mapping")
    return turn
