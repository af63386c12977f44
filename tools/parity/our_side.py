"""Chats of the gate as the trainer's micro-batches, with the tokenizer and tiles of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.alignment import row_multiple
from conf.schema import Config
from data_shards import images
from data_shards.batch import PackedBatch
from data_shards.chat import ChatTokenizer, Encoded
from data_shards.collate import LoadedSample, collate
from models.anyres import AnyresGeometry
from tools.parity.cases import Case

MAX_PIXELS = 50_000_000
_INPUTS = (
    "tokens_T",
    "position_ids_T",
    "tiles_NCHW",
    "image_positions_P",
    "image_rows_P",
    "cu_seqlens",
)


@dataclass(frozen=True)
class OurSide:
    """How the trainer reads a chat."""

    tokenizer: ChatTokenizer
    geometry: AnyresGeometry
    config: Config

    def sizes(self, case: Case) -> tuple[tuple[int, int], ...]:
        """(height, width) of its pictures."""
        pictures = [images.decode(data, MAX_PIXELS) for data in case.pictures]
        return tuple((picture.height, picture.width) for picture in pictures)

    def prompt(self, case: Case) -> np.ndarray:
        """int64 ids up to the answer, image tokens expanded."""
        content = [{"type": "image"} for _ in case.pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": case.text}]}
        counts = [self.geometry.n_tokens(*size) for size in self.sizes(case)]
        return self.tokenizer.encode_prompt([message], counts)

    def batch(self, case: Case, ids: np.ndarray) -> PackedBatch:
        """One micro-batch of the chat with `ids` for its text, padded as the layout wants."""
        is_image = ids == self.tokenizer.image_token_id
        counts = [self.geometry.n_tokens(*size) for size in self.sizes(case)]
        # Images may stand next to each other, so the counts say where each begins.
        positions = np.flatnonzero(is_image)
        starts = positions[np.cumsum([0, *counts])[:-1]] if counts else np.empty(0, np.int64)
        document = Encoded(ids, np.zeros(len(ids), bool), starts)
        sample = LoadedSample((0, 0), (document,), self.sizes(case), case.pictures)
        multiple = row_multiple(self.config.parallel, self.config.precision)
        return collate(
            [[sample]],
            self.geometry,
            sequence_length=-(-len(ids) // multiple) * multiple,
            document_multiple=1,
            pad_id=self.tokenizer.pad_id,
            need_images=True,
        )


def save_batch(path: Path, packed: PackedBatch, first: int) -> None:
    """What `megatron_rank` reads: the model's inputs and the first position to keep."""
    arrays: dict[str, Any] = {name: getattr(packed, name) for name in _INPUTS}
    longest = np.diff(packed.cu_seqlens).max()
    np.savez(path, **arrays, max_seqlen=longest, first=np.array(first))
