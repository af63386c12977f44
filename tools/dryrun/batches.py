"""Micro-batches of the stage's true size, out of the tiling geometry and settings alone.

Samples are made up; the loader's own `collate` lays them into packs, so that document boundaries,
padding, image positions and feature rows are the training's.
"""

from collections.abc import Iterator

import numpy as np

from conf.check import TEXT_ROOM
from conf.schema import Config
from data_shards.batch import PackedBatch
from data_shards.chat import Encoded
from data_shards.collate import LoadedSample, collate
from models.anyres import AnyresGeometry

HEAVIEST, TEXT, MIX = "heaviest", "text", "mix"
KINDS = (HEAVIEST, TEXT, MIX)

Size = tuple[int, int]


def kinds_of(replica: int, replicas: int, count: int) -> tuple[str, ...]:
    """Kinds of a data-parallel replica's `count` micro-batches.

    The last replica has never an image, the middle one always as many as fit: neither may make
    its peers wait. The others take turns.
    """
    if replica == replicas - 1 and replicas > 1:
        return (TEXT,) * count
    if replica == replicas // 2 and replicas > 2:
        return (HEAVIEST,) * count
    return tuple(KINDS[(replica + number) % len(KINDS)] for number in range(count))


def micro_batch_count(config: Config) -> int:
    """As many as the schedule needs to show its pattern, at most as many as the stage has."""
    stage, parallel = config.stage, config.parallel
    whole = stage.global_batch_size // (stage.micro_batch_size * parallel.data)
    return min(whole, 2 * parallel.pipeline)


def micro_batch(config: Config, kind: str, need_images: bool) -> PackedBatch:
    """One micro-batch; `need_images` is false past the first pipeline stage, as in training."""
    stage = config.stage
    geometry = AnyresGeometry.from_model(config.model)
    packs = [
        list(_pack(config, geometry, kind, first=number * stage.sequence_length))
        for number in range(stage.micro_batch_size)
    ]
    return collate(
        packs,
        geometry,
        sequence_length=stage.sequence_length,
        document_multiple=stage.document_multiple,
        pad_id=0,
        need_images=need_images,
    )


def _pack(
    config: Config, geometry: AnyresGeometry, kind: str, first: int
) -> Iterator[LoadedSample]:
    """Samples of one pack; `first` numbers them."""
    stage = config.stage
    documents = 2 if stage.objective == "dpo" else 1
    multiple = stage.document_multiple
    tokens_left = stage.sequence_length
    tiles_left = stage.max_tiles_per_pack or 1 << 30
    for number, (text, sizes) in enumerate(_wishes(geometry, kind, stage.sequence_length)):
        tokens = text + sum(geometry.n_tokens(*size) for size in sizes)
        room = documents * (-(-tokens // multiple) * multiple)
        tiles = sum(geometry.n_tiles(*size) for size in sizes)
        if room > tokens_left or tiles > tiles_left:
            continue
        tokens_left -= room
        tiles_left -= tiles
        document = _document(config.model.image_token_id, geometry, text, sizes)
        yield LoadedSample((0, first + number), (document,) * documents, sizes, None)


def _wishes(
    geometry: AnyresGeometry, kind: str, length: int
) -> Iterator[tuple[int, tuple[Size, ...]]]:
    """(text tokens, image sizes) of samples, to be taken as far as they fit."""
    tile = geometry.tile
    largest = max(geometry.pinpoints, key=lambda size: geometry.n_tokens(*size))
    small, wide = (tile, tile), (tile // 2, tile * 2)
    if kind == HEAVIEST:
        yield from [(TEXT_ROOM, (largest,))] * (length // geometry.n_tokens(*largest) + 1)
        yield from [(TEXT_ROOM, (small,))] * (length // geometry.n_tokens(*small) + 1)
    elif kind == TEXT:  # unequal lengths, one of them odd
        yield length // 4 - 1, ()
        yield from [(length // 8, ())] * 2
        yield from [(length // 32, ())] * 32
    else:
        for _ in range(4):
            yield TEXT_ROOM, (wide,)
            yield length // 16 + 1, ()
            yield 2 * TEXT_ROOM, (small, wide)
            yield length // 32, (small,)
        # what is left of the pack is padding


def _document(
    image_token: int, geometry: AnyresGeometry, text: int, sizes: tuple[Size, ...]
) -> Encoded:
    """Images first, then text whose second half is the answer."""
    starts: list[int] = []
    length = 0
    for size in sizes:
        starts.append(length)
        length += geometry.n_tokens(*size)
    ids = np.full(length + text, image_token, np.int64)
    ids[length:] = 1
    targets = np.zeros(length + text, bool)
    targets[length + text // 2 :] = True
    return Encoded(ids=ids, targets=targets, image_starts=np.array(starts, np.int64))
