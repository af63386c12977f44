"""Packed rows of any model shape, without data, tokenizer or picture decoder.

Random ids and pixels, but real geometry: pictures of given sizes are tiled and laid out by
`models.anyres` as in training, documents have the lengths that a mixture of pictures, chats and
plain text has.
"""

from dataclasses import dataclass

import numpy as np

from conf.schema import ModelConfig
from data_shards.batch import PackedBatch
from models.anyres import NEWLINE, AnyresGeometry


@dataclass(frozen=True)
class Mixture:
    """What a row holds: pictures by size, each with its document, the rest text documents.

    Attributes:
        images: (height, width) in pixels, taken in turn while their documents fit.
        text: tokens of text that stand with each picture.
        documents: lengths of text-only documents, taken in turn.
        image_share: most of the row's tokens that documents with a picture may take.
        target_share: share of the text tokens that are targets.
        pairs: every document twice in a row, as (chosen, rejected) with the same picture.
    """

    images: tuple[tuple[int, int], ...] = ()
    text: int = 256
    documents: tuple[int, ...] = (900, 250, 500, 120)
    image_share: float = 0.6
    target_share: float = 0.33
    pairs: bool = False


def row_documents(
    model: ModelConfig, length: int, mixture: Mixture, multiple: int = 8
) -> list[tuple[int, tuple[int, int] | None]]:
    """(tokens, size of the picture or None) of each document of a row, a pair counting once.

    Raises:
        ValueError: not even one document fits.
    """
    geometry, sides = AnyresGeometry.from_model(model), 2 if mixture.pairs else 1
    documents: list[tuple[int, tuple[int, int] | None]] = []
    used = 0
    for size in mixture.images:
        tokens = geometry.n_tokens(*size) + mixture.text
        taken = sides * -(-tokens // multiple) * multiple
        if used + taken <= mixture.image_share * length:
            documents.append((tokens, size))
            used += taken
    number = 0
    while length - used >= sides * 2 * multiple:
        room = (length - used) // sides // multiple * multiple
        tokens = min(mixture.documents[number % len(mixture.documents)], room)
        documents.append((tokens, None))
        used += sides * -(-tokens // multiple) * multiple
        number += 1
    if not documents:
        raise ValueError(f"no document fits a row of {length} tokens")
    return documents


def packed_row(
    model: ModelConfig, length: int, mixture: Mixture, seed: int, multiple: int = 8
) -> PackedBatch:
    """One pack of `length` tokens; only what is less than `multiple` of a document stays empty.

    Raises:
        ValueError: not even one document fits.
    """
    geometry = AnyresGeometry.from_model(model)
    draw, sides, pad = np.random.default_rng(seed), 2 if mixture.pairs else 1, 0
    documents = row_documents(model, length, mixture, multiple)
    n_tiles = max(sum(geometry.n_tiles(*size) for _, size in documents if size), 1)
    per_tile, side = geometry.grid**2, geometry.tile
    tokens_T, labels_T = np.full(length, pad, np.int64), np.zeros(length, np.int64)
    loss_mask_T = np.zeros(length, np.float32)
    ends, pairs, positions, rows = [0], [], [], []
    first_tile = 0
    for tokens, picture in documents:
        if mixture.pairs:
            pairs.append((len(ends) - 1, len(ends)))
        for _ in range(sides):
            start = ends[-1]
            ids = draw.integers(1, min(model.image_token_id, model.text.vocab_size - 1), tokens)
            target = draw.random(tokens) < mixture.target_share
            if picture is not None:
                image = geometry.n_tokens(*picture)
                ids[:image], target[: image + 1] = model.image_token_id, False
                table = geometry.feature_rows(*picture)
                rows.append(
                    np.where(table == NEWLINE, n_tiles * per_tile, table + first_tile * per_tile)
                )
                positions.append(start + np.arange(image))
            target[-1] = True  # a document without any target would be a masked one
            tokens_T[start : start + tokens] = ids
            loss_mask_T[start : start + tokens - 1] = target[1:]
            labels_T[start : start + tokens - 1] = np.where(target[1:], ids[1:], 0)
            ends.append(start + -(-tokens // multiple) * multiple)
        if picture is not None:
            first_tile += geometry.n_tiles(*picture)
    if ends[-1] < length:
        ends.append(length)
    cu_seqlens, empty = np.array(ends, np.int32), np.empty(0, np.int64)
    starts_T = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)).astype(np.int64)
    return PackedBatch(
        tokens_T=tokens_T,
        labels_T=labels_T,
        loss_mask_T=loss_mask_T,
        position_ids_T=np.arange(length) - starts_T,
        cu_seqlens=cu_seqlens,
        tiles_NCHW=draw.integers(0, 256, (n_tiles, 3, side, side), dtype=np.uint8),
        image_positions_P=np.concatenate([empty, *positions]),
        image_rows_P=np.concatenate([empty, *rows]),
        pairs=np.array(pairs, np.int64).reshape(-1, 2),
        sample_ids=np.stack([np.zeros(len(documents)), np.arange(len(documents))], 1).astype(
            np.int64
        ),
        n_images=sum(size is not None for _, size in documents),
        n_masked=0,
    )
