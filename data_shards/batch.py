"""The one format of every batch: packed rows of documents, as NumPy arrays (docs/architecture.md).

Labels are already shifted: `labels_T[i]` is the token that follows `tokens_T[i]` in its document.
"""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: `micro_batch_size` packs laid end to end, T tokens in all (`thd` layout).

    Attributes:
        tokens_T: int64; the image token's id at image positions, the pad id at padding.
        labels_T: int64; the next token of the same document, 0 where `loss_mask_T` is 0.
        loss_mask_T: float32; 1 where `labels_T` is an answer token (the end token included).
        position_ids_T: int64; restart at 0 in every document.
        cu_seqlens: int32 [documents + 1]; padding documents are documents too, and none is empty.
        tiles_NCHW: uint8 [N, 3, side, side], not rescaled; one black tile when there is no image
            (or when the loader was told that this rank needs none).
        image_positions_P: int64; positions in T that hold an image feature.
        image_rows_P: int64; row of the feature table there: rows 0 .. n_tiles*g*g-1 are the
            tiles' patches, end to end, and row n_tiles*g*g is `image_newline`.
        pairs: int64 [pairs, 2]; document numbers (chosen, rejected), in the order of
            `sample_ids`; empty for supervised batches.
        sample_ids: int64 [samples, 2]; (number of the data set in the mixture, manifest row).
        n_images: images in this micro-batch.
        n_masked: samples whose bytes were bad: documents keep their lengths, loss mask 0.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray
    loss_mask_T: np.ndarray
    position_ids_T: np.ndarray
    cu_seqlens: np.ndarray
    tiles_NCHW: np.ndarray
    image_positions_P: np.ndarray
    image_rows_P: np.ndarray
    pairs: np.ndarray
    sample_ids: np.ndarray
    n_images: int
    n_masked: int

    def equals(self, other: "PackedBatch") -> bool:
        """Every field equal, dtypes and shapes included."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, np.ndarray):
                if mine.dtype != theirs.dtype or not np.array_equal(mine, theirs):
                    return False
            elif mine != theirs:
                return False
        return True
