"""Stored records to tokenised documents, checked against what the manifest promises."""

import json
from collections.abc import Sequence

from data_shards.chat import ChatTokenizer, Encoded
from data_shards.foreign_records import read_record
from data_shards.manifest import Manifest
from data_shards.sample import SampleError, count_images, record_messages
from models.anyres import AnyresGeometry


class RecordEncoder:
    """Reads the records of one data set. Thread-safe.

    Args:
        tokenizer, geometry: those that the data set was built with.
    """

    def __init__(self, manifest: Manifest, tokenizer: ChatTokenizer, geometry: AnyresGeometry):
        self._manifest, self._tokenizer, self._geometry = manifest, tokenizer, geometry

    def encode(self, row: int, record: bytes) -> tuple[Encoded, ...]:
        """One document, or (chosen, rejected), of the sample in manifest row `row`.

        Raises:
            ValueError: the record is no sample, or has other tokens than the manifest says.
        """
        manifest = self._manifest
        first, last = manifest.first_image[row : row + 2]
        image_hw = manifest.image_hw[first:last].tolist()
        try:
            documents = self._documents(row, record, image_hw)
        except RecursionError:
            raise SampleError("its JSON is nested too deeply") from None
        lengths = [int(manifest.tokens[row])]
        if manifest.info.preference:
            lengths.append(int(manifest.tokens_rejected[row]))
        found = [len(document.ids) for document in documents]
        if found != lengths:
            raise SampleError(f"{_list(found)} tokens, its manifest says {_list(lengths)}")
        targets = sum(document.n_targets for document in documents)
        if targets != manifest.target_tokens[row]:
            said = int(manifest.target_tokens[row])
            raise SampleError(f"{targets} tokens to train on, its manifest says {said}")
        return documents

    def _documents(
        self, row: int, record: bytes, image_hw: Sequence[Sequence[int]]
    ) -> tuple[Encoded, ...]:
        messages, chosen, rejected = read(self._manifest, row, record)
        image_tokens = [self._geometry.n_tokens(height, width) for height, width in image_hw]
        if chosen is None or rejected is None:
            return (self._tokenizer.encode(messages, image_tokens),)
        return self._tokenizer.encode_preference(messages, chosen, rejected, image_tokens)


def read(
    manifest: Manifest, row: int, record: bytes
) -> tuple[list[dict[str, object]], str | None, str | None]:
    """(messages, chosen, rejected) of the record in manifest row `row`; ours or another's.

    Raises:
        ValueError: it is no record, has not as many image placeholders as images, or is a pair
            among samples or the reverse.
    """
    first, last = manifest.first_image[row : row + 2]
    images, info = int(last - first), manifest.info
    if info.layout is None:
        messages, chosen, rejected = record_messages(json.loads(record))
    else:
        messages, chosen, rejected = read_record(record, info.layout, manifest.key(row), images)
    marks = count_images(messages)
    if marks != images:
        raise SampleError(f"{marks} image placeholders but {images} images")
    is_pair = isinstance(chosen, str) and isinstance(rejected, str)
    if is_pair != info.preference:
        raise SampleError("a pair among samples" if is_pair else "no chosen and rejected answers")
    return messages, chosen, rejected


def _list(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
