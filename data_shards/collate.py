"""Samples of a micro-batch, laid end to end as one `PackedBatch`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_shards import images
from data_shards.batch import PackedBatch
from data_shards.chat import Encoded
from models.anyres import NEWLINE, AnyresGeometry


class BadPicture(ValueError):
    """A stored image that is not what the builder measured."""

    def __init__(self, sample_id: tuple[int, int], cause: str):
        super().__init__(cause)
        self.sample_id = sample_id


@dataclass(frozen=True)
class LoadedSample:
    """One sample, read and tokenised.

    Attributes:
        sample_id: (data set number, manifest row).
        documents: one, or (chosen, rejected).
        image_hw: (height, width) in pixels of each image.
        image_bytes: encoded images; None when this sample is masked.
        mask_reason: why its bytes were bad, else None.
    """

    sample_id: tuple[int, int]
    documents: tuple[Encoded, ...]
    image_hw: tuple[tuple[int, int], ...]
    image_bytes: tuple[bytes, ...] | None
    mask_reason: str | None = None


def collate(
    packs: Sequence[Sequence[LoadedSample]],
    geometry: AnyresGeometry,
    *,
    sequence_length: int,
    document_multiple: int,
    pad_id: int,
    need_images: bool,
    tile_share: tuple[int, int] = (0, 1),
) -> PackedBatch:
    """Lay packs end to end; see `PackedBatch` for shapes.

    Every document is padded to `document_multiple` with `pad_id`; what is left of a pack is one
    padding document.

    Args:
        need_images: False leaves out all pictures: `tiles_NCHW` is then one black tile.
        tile_share: (rank, ranks) of those that compute the tiles of this batch together; pictures
            without a tile in this rank's share stay black (`own_tiles`).

    Raises:
        BadPicture: stored bytes do not decode, or decode to another size.
    """
    samples = [sample for pack in packs for sample in pack]
    hw = [size for sample in samples for size in sample.image_hw]
    tiles_of = [geometry.n_tiles(*size) for size in hw]
    n_tiles = max(sum(tiles_of), 1)
    rows_per_tile = geometry.grid * geometry.grid
    first_tile = np.concatenate([[0], np.cumsum(tiles_of, dtype=np.int64)])

    total = len(packs) * sequence_length
    tokens_T = np.full(total, pad_id, np.int64)
    labels_T = np.zeros(total, np.int64)
    loss_mask_T = np.zeros(total, np.float32)
    ends: list[int] = [0]
    pairs: list[tuple[int, int]] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    image = 0
    for number, pack in enumerate(packs):
        for sample in pack:
            if len(sample.documents) == 2:
                pairs.append((len(ends) - 1, len(ends)))
            for document in sample.documents:
                start, n = ends[-1], len(document.ids)
                tokens_T[start : start + n] = document.ids
                targets = document.targets[1:]
                loss_mask_T[start : start + n - 1] = targets
                labels_T[start : start + n - 1] = np.where(targets, document.ids[1:], 0)
                # Both documents of a pair look at the same tiles.
                for which, image_start in enumerate(document.image_starts):
                    table = _feature_rows(geometry, *sample.image_hw[which])
                    offset = first_tile[image + which] * rows_per_tile
                    newline = n_tiles * rows_per_tile
                    rows.append(np.where(table == NEWLINE, newline, table + offset))
                    positions.append(start + image_start + np.arange(len(table)))
                ends.append(start + -(-n // document_multiple) * document_multiple)
            image += len(sample.image_hw)
        row_end = (number + 1) * sequence_length
        assert ends[-1] <= row_end, "the plan put more into a pack than fits"
        if ends[-1] < row_end:
            ends.append(row_end)
    cu_seqlens = np.array(ends, np.int32)
    lengths = np.diff(cu_seqlens)
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=loss_mask_T,
        position_ids_T=np.arange(total) - np.repeat(cu_seqlens[:-1], lengths).astype(np.int64),
        cu_seqlens=cu_seqlens,
        tiles_NCHW=_tiles(samples, geometry, tiles_of, n_tiles, tile_share)
        if need_images and tiles_of
        else np.zeros((1, 3, geometry.tile, geometry.tile), np.uint8),
        image_positions_P=_joined(positions),
        image_rows_P=_joined(rows),
        pairs=np.array(pairs, np.int64).reshape(-1, 2),
        sample_ids=np.array([s.sample_id for s in samples], np.int64).reshape(-1, 2),
        n_images=len(hw),
        n_masked=sum(sample.mask_reason is not None for sample in samples),
    )


def own_tiles(n_tiles: int, tile_share: tuple[int, int]) -> range:
    """The tiles of a batch that rank (rank, ranks) runs through the vision tower: what
    `models.tile_sharing.own_share` cuts out, without its black padding."""
    rank, ranks = tile_share
    share = -(-n_tiles // ranks)
    return range(min(rank * share, n_tiles), min((rank + 1) * share, n_tiles))


def _tiles(
    samples: Sequence[LoadedSample],
    geometry: AnyresGeometry,
    tiles_of: Sequence[int],
    n_tiles: int,
    tile_share: tuple[int, int],
) -> np.ndarray:
    """uint8 [n_tiles, 3, tile, tile]; black where a sample is masked or another rank looks."""
    out_NCHW = np.zeros((n_tiles, 3, geometry.tile, geometry.tile), np.uint8)
    own = own_tiles(n_tiles, tile_share)
    image = first = 0
    for sample in samples:
        for which, (height, width) in enumerate(sample.image_hw):
            stop = first + tiles_of[image]
            if sample.image_bytes is not None and first < own.stop and own.start < stop:
                data = sample.image_bytes[which]
                try:
                    images.write_tiles_from(data, height, width, geometry, out_NCHW[first:stop])
                except images.ImageError as error:
                    raise BadPicture(sample.sample_id, f"image {which}: {error}") from None
            first = stop
            image += 1
    return out_NCHW


@lru_cache(maxsize=512)
def _feature_rows(geometry: AnyresGeometry, height: int, width: int) -> np.ndarray:
    return geometry.feature_rows(height, width)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts])
