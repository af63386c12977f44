"""JSON from outside, with limits on what it may cost before any of it is parsed."""

import json
from typing import Any

MAX_BYTES = 64 << 20  # of one row
# A bracket may cost 100 bytes of memory, a comma 60: "[[],[],...]" grows thirtyfold.
MAX_BRACKETS = 1_000_000
MAX_COMMAS = 4_000_000
MAX_DEPTH = 64  # what is deeper could overflow the stack wherever it is compared or printed


class JsonError(ValueError):
    """Text that is not acceptable JSON; the message is a reason, without the place."""


def parse(text: bytes | str) -> Any:
    """The value of one JSON text. NaN and Infinity, which JSON does not know but Python writes,
    count as null.

    Raises:
        JsonError: too large, too deep, numbers of thousands of digits, not UTF-8, not JSON.
    """
    if len(text) > MAX_BYTES:
        raise JsonError(f"the JSON has over {MAX_BYTES} bytes")
    _limit(text, "[{", MAX_BRACKETS)
    _limit(text, ",", MAX_COMMAS)
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, parse_constant=lambda name: None)
    except UnicodeDecodeError:
        raise JsonError("the JSON is not UTF-8") from None
    except RecursionError:
        raise JsonError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        # Its own message names a line, which people would take for one of the file.
        raise JsonError(f"not JSON ({error.msg} at character {error.pos})") from None
    except ValueError as error:
        raise JsonError(f"not acceptable JSON ({error})") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def parse_object(text: bytes | str) -> dict[str, Any]:
    """As `parse`, of an object.

    Raises:
        JsonError: also for any other value.
    """
    value = parse(text)
    if not isinstance(value, dict):
        raise JsonError("not a JSON object")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if _nests(value) else []
    for _ in range(MAX_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for some in children for child in some if _nests(child)]
        if not level:
            return
    raise JsonError("the JSON is nested too deeply")


def _nests(value: Any) -> bool:
    return isinstance(value, (list, dict))


def _limit(text: bytes | str, characters: str, most: int) -> None:
    if len(text) <= most:
        return
    found = sum(
        text.count(c.encode()) if isinstance(text, bytes) else text.count(c) for c in characters
    )
    if found > most:
        raise JsonError(f"the JSON has over {most} of {' '.join(characters)}")
