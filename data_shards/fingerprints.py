"""What the search for duplicates compares of a sample: its text and its images, as digests.

About 100 bytes a sample with one image, in Arrow and in Parquet.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from data_shards.image_store import StoredImage
from data_shards.sample import IMAGE_MARK, Sample, text_of

IMAGE = pa.struct(
    [
        ("sha256", pa.binary(32)),  # of the stored bytes
        ("pixels", pa.binary(16)),  # of the pixels; null for a JPEG
        ("hash", pa.binary(32)),  # difference hash
    ]
)
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # row in its data set
        ("text", pa.binary(16)),  # the whole conversation
        ("images", pa.list_(IMAGE)),
    ]
)


def fingerprint(sample: Sample, images: Sequence[StoredImage]) -> dict[str, Any]:
    """The columns of `SCHEMA`, without the row's number."""
    return {
        "text": text_digest(sample),
        "images": [
            {"sha256": image.sha256, "pixels": image.pixels, "hash": image.hash} for image in images
        ],
    }


def text_digest(sample: Sample) -> bytes:
    """16 bytes that say who says what, whatever the case, the spacing, the forms of characters that
    look alike (NFKC) and the places of the images."""
    digest = hashlib.blake2b(digest_size=16)
    for role, text in _texts(sample):
        words = unicodedata.normalize("NFKC", text).casefold().split()
        digest.update(f"{role}\0{' '.join(words)}\0".encode())
    return digest.digest()


def _texts(sample: Sample) -> Iterator[tuple[str, str]]:
    for message in sample.messages:
        text = text_of(message["content"])
        if isinstance(message["content"], str) and message["role"] == "user":
            text = text.replace(IMAGE_MARK, " ")
        yield message["role"], text
    for role, answer in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if answer is not None:
            yield role, answer
