"""Chats as requests to a server that speaks OpenAI's protocol, the model card's own among them."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.anyres import AnyresGeometry
from tools.parity.cases import Case, picture

CARD = "card"


def data_url(png: bytes) -> str:
    """A picture inside its address, so that nothing has to be fetched."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def request_of(case: Case, model: str) -> dict[str, Any]:
    """The body that asks `model` this case: pictures, then the text, in one user turn."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(png)}} for png in case.pictures
    ]
    content.append({"type": "text", "text": case.text})
    return {
        "model": model,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }


def card_request(export: Path) -> dict[str, Any] | None:
    """The body of the curl command in the export's README.md; None where there is none."""
    path = export / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    _, found, rest = text.partition("/v1/chat/completions")
    body, quote, _ = rest.partition("-d '")[2].partition("'\n")
    if not found or not quote:
        return None
    try:
        request = json.loads(body)
    except ValueError as error:
        raise ValueError(
            f"{path}: the curl command's body is no JSON ({error}); mend it or export again"
        ) from None
    if not all(isinstance(part, dict) for part in _parts(request)):
        raise ValueError(f"{path}: the curl command's body is no chat; mend it or export again")
    return dict(request)


def card_case(request: dict[str, Any], geometry: AnyresGeometry) -> Case:
    """The card's question, about a picture of our own."""
    texts = [str(part.get("text")) for part in _parts(request) if part.get("type") == "text"]
    side = geometry.tile
    return Case(CARD, (picture(6, side + side // 3, side - side // 5),), "\n".join(texts))


def with_picture(request: dict[str, Any], png: bytes, model: str) -> dict[str, Any]:
    """The card's request about this picture; everything else stays as the card has it."""
    request = json.loads(json.dumps(request))
    request["model"] = model
    for part in _parts(request):
        if part.get("type") == "image_url":
            part["image_url"] = {"url": data_url(png)}
    return request


def _parts(request: Any) -> Iterator[Any]:
    messages = request.get("messages") if isinstance(request, dict) else None
    for message in messages if isinstance(messages, list) else [None]:
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else [None]
