"""Packed batches taken apart into documents, and documents laid out as either side wants them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conf.schema import ModelConfig
from data_shards.batch import PackedBatch
from models.anyres import NEWLINE, AnyresGeometry
from models.vision_tower import pixel_table

IGNORED = -100  # transformers' label of a token that is no target


@dataclass(frozen=True)
class Document:
    """One tokenised sample, without padding.

    Attributes:
        tokens_L, labels_L, loss_mask_L: as in `PackedBatch`.
        image_positions_P: places in the document that hold an image feature.
        tiles_NCHW: uint8, of all its images.
        sizes: (height, width) in pixels of each image.
        sample_id: (data set number, manifest row).
    """

    tokens_L: np.ndarray
    labels_L: np.ndarray
    loss_mask_L: np.ndarray
    image_positions_P: np.ndarray
    tiles_NCHW: np.ndarray
    sizes: tuple[tuple[int, int], ...]
    sample_id: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens_L)

    @property
    def targets(self) -> int:
        """Target tokens."""
        return int(self.loss_mask_L.sum())


def split(
    batch: PackedBatch,
    lengths: Sequence[int],
    sizes: Sequence[Sequence[tuple[int, int]]],
    geometry: AnyresGeometry,
) -> list[Document]:
    """The documents of a supervised batch, in its order.

    Args:
        lengths: tokens of each sample without padding, in the order of `batch.sample_ids`.
        sizes: its images' heights and widths.
    """
    documents: list[Document] = []
    starts = iter(batch.cu_seqlens[:-1].tolist())
    spans = dict(zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True))
    first_tile = 0
    for number, (length, images) in enumerate(zip(lengths, sizes, strict=True)):
        start = next(starts)
        # A pack that is full has no padding document; one that is not ends in one without targets
        # and without images, which no sample is.
        while not batch.loss_mask_T[start : spans[start]].any():
            start = next(starts)
        inside = (batch.image_positions_P >= start) & (batch.image_positions_P < start + length)
        tiles = sum(geometry.n_tiles(*size) for size in images)
        documents.append(
            Document(
                tokens_L=batch.tokens_T[start : start + length],
                labels_L=batch.labels_T[start : start + length],
                loss_mask_L=batch.loss_mask_T[start : start + length],
                image_positions_P=batch.image_positions_P[inside] - start,
                tiles_NCHW=batch.tiles_NCHW[first_tile : first_tile + tiles],
                sizes=tuple(images),
                sample_id=(int(batch.sample_ids[number, 0]), int(batch.sample_ids[number, 1])),
            )
        )
        first_tile += tiles
    return documents


def lay(
    packs: Sequence[Sequence[Document]],
    length: int,
    geometry: AnyresGeometry,
    pad_id: int,
    multiple: int = 1,
) -> PackedBatch:
    """Rows of `length` tokens laid end to end, as `data_shards.collate` does with samples."""
    total = len(packs) * length
    tokens_T, labels_T = np.full(total, pad_id, np.int64), np.zeros(total, np.int64)
    loss_mask_T = np.zeros(total, np.float32)
    ends, positions, rows, tiles = [0], [], [], []
    first_tile = 0
    everything = [document for pack in packs for document in pack]
    newline = max(sum(len(d.tiles_NCHW) for d in everything), 1) * geometry.grid**2
    for number, pack in enumerate(packs):
        for document in pack:
            start, count = ends[-1], len(document)
            tokens_T[start : start + count] = document.tokens_L
            labels_T[start : start + count] = document.labels_L
            loss_mask_T[start : start + count] = document.loss_mask_L
            positions.append(document.image_positions_P + start)
            for size in document.sizes:
                table = geometry.feature_rows(*size)
                rows.append(
                    np.where(table == NEWLINE, newline, table + first_tile * geometry.grid**2)
                )
                first_tile += geometry.n_tiles(*size)
            tiles.append(document.tiles_NCHW)
            ends.append(start + -(-count // multiple) * multiple)
        assert ends[-1] <= (number + 1) * length, "more in a pack than fits"
        if ends[-1] < (number + 1) * length:
            ends.append((number + 1) * length)
    cu_seqlens = np.array(ends, np.int32)
    starts_T = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)).astype(np.int64)
    side, empty = geometry.tile, np.empty(0, np.int64)
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=loss_mask_T,
        position_ids_T=np.arange(total) - starts_T,
        cu_seqlens=cu_seqlens,
        tiles_NCHW=np.concatenate(tiles) if first_tile else np.zeros((1, 3, side, side), np.uint8),
        image_positions_P=np.concatenate([empty, *positions]),
        image_rows_P=np.concatenate([empty, *rows]),
        pairs=np.empty((0, 2), np.int64),
        sample_ids=np.array([d.sample_id for d in everything], np.int64).reshape(-1, 2),
        n_images=sum(len(d.sizes) for d in everything),
        n_masked=0,
    )


def padded_for_transformers(
    documents: Sequence[Document], pad_id: int, length: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of `LlavaNextForConditionalGeneration.forward`, padded on the right.

    To the longest document, or to `length`. Pixels are normalised here, so that this side spends
    nothing on them.
    """
    longest = length or max(map(len, documents))
    shape = (len(documents), longest)
    ids, attended = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, document in enumerate(documents):
        count = len(document)
        ids[row, :count] = document.tokens_L
        attended[row, :count] = 1
        targets = np.flatnonzero(document.loss_mask_L)
        labels[row, targets + 1] = document.labels_L[targets]  # unshifted: the model shifts
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(attended),
        "labels": torch.from_numpy(labels),
    }
    images = [image for document in documents for image in _images(document)]
    if images:
        table, most = pixel_table(), max(len(tiles) for tiles in images)
        pixels = torch.zeros(len(images), most, *images[0].shape[1:])
        for number, tiles in enumerate(images):
            pixels[number, : len(tiles)] = table[torch.from_numpy(tiles).long()]
        sizes = [size for document in documents for size in document.sizes]
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return inputs


def _images(document: Document) -> Iterable[np.ndarray]:
    if len(document.sizes) == 1:
        return [document.tiles_NCHW]
    assert not document.sizes, "the demo's samples hold one image at most"
    return []


def transformers_twin(model: ModelConfig, special_ids: dict[str, int | None]) -> torch.nn.Module:
    """`LlavaNextForConditionalGeneration` of the same shape, with transformers' initial weights."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    from tools.hf_config import llava_config

    config = LlavaNextConfig(**llava_config(model, special_ids, "float32"))
    twin: torch.nn.Module = LlavaNextForConditionalGeneration(config)
    return twin
