"""The text member of a sample in an archive that we index but did not write (data_shards/in_place).

One member is read: the JSON record (`jpg` + `json`, as energon's crude data sets and webdataset's
users write), or the caption as plain text (`jpg` + `txt`, as img2dataset writes).
"""

from collections.abc import Mapping
from typing import Any

from data_shards.layouts import Rules, record_messages
from data_shards.sample import SampleError, parse_sample
from data_shards.sources import json_text
from data_shards.sources.json_text import JsonError


def read_record(
    data: bytes, layout: Mapping[str, Any], key: str, n_images: int
) -> tuple[list[dict[str, Any]], str | None, str | None]:
    """(messages, chosen, rejected), checked and normalised as the builder does it.

    Args:
        layout: `ManifestInfo.layout`.
        key: of the manifest, the number of the sample; it decides the prompt of a caption.
        n_images: image members of the sample.

    Raises:
        SampleError: the member holds no sample of this layout.
    """
    rules = Rules.from_json(layout)
    messages, chosen, rejected = record_messages(_record(data), rules, int(key), n_images)
    sample = parse_sample(
        {"messages": messages, "chosen": chosen, "rejected": rejected},
        [b""] * n_images,
        key=key,
        source="",
        licence="",
        origin="",
        preference=rules.preference,
    )
    return list(sample.messages), sample.chosen, sample.rejected


def _record(data: bytes) -> dict[str, Any]:
    """A JSON object, or whatever else the text is, as the member `txt`."""
    try:
        return json_text.parse_object(data)
    except JsonError:
        pass
    try:
        return {"txt": data.decode("utf-8")}
    except UnicodeDecodeError:
        raise SampleError("its text is not UTF-8") from None
