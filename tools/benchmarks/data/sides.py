"""The ways from an archive to tiles that are compared, each run in a process of its own.

A turn is one set of pictures, the sets one after another; what it reports belongs to that set.
Everything that a side can do once (opening, settings, its output array) is done before its turns.
"""

import io
import itertools
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from models.anyres import AnyresGeometry
from tools.benchmarks.data.sets import ENERGON, ImageSet

Turn = Callable[[], dict[str, float]]
# Takes a set; yields the tiles of each picture, uint8 or normalised float32 [n_tiles, 3, 384, 384].
Pictures = Callable[[ImageSet], Iterable[Any]]


def ours(sets: Sequence[ImageSet], repeats: int, backend: str = "") -> Turn:
    """The loader's path: index, pread, CRC-32, decode and tile into a uint8 array."""
    if backend:
        os.environ["AMALIA_PIXELS"] = backend  # before the module looks for it
    from data_shards.images import write_tiles_from
    from data_shards.manifest import read_manifest
    from data_shards.reader import DescriptorCache, ShardReader

    cache = DescriptorCache()
    readers = {
        s.name: ShardReader(read_manifest(s.folder / "manifest.parquet"), cache) for s in sets
    }
    arrays = {s.name: new_array(s) for s in sets}

    def pictures(image_set: ImageSet) -> Iterable[np.ndarray]:
        reader, out_NCHW = readers[image_set.name], arrays[image_set.name]
        height, width, geometry = image_set.height, image_set.width, image_set.geometry
        for row in range(image_set.count):
            data = reader.read(row)[1][0]
            write_tiles_from(data, height, width, geometry, out_NCHW)
            yield out_NCHW

    return _turns(sets, pictures, repeats)


def with_transformers(sets: Sequence[ImageSet], repeats: int, fast: bool = False) -> Turn:
    """Pillow and `LlavaNextImageProcessor`; the files are read as ours are, the cheapest way."""
    readers = {s.name: _bytes_by_index(s) for s in sets}
    processors = {s.name: processor_of(s.geometry, fast) for s in sets}

    def pictures(image_set: ImageSet) -> Iterable[Any]:
        processor = processors[image_set.name]
        for data in readers[image_set.name]():
            found = processor(opened(data), return_tensors="pt" if fast else "np")
            yield found["pixel_values"][0]

    return _turns(sets, pictures, repeats)


def with_webdataset(sets: Sequence[ImageSet], repeats: int, normalise: bool) -> Turn:
    """webdataset's reader, Pillow, NumPy."""
    import webdataset

    streams = {
        s.name: webdataset.WebDataset(str(s.archive), shardshuffle=False, empty_check=False)
        for s in sets
    }

    def pictures(image_set: ImageSet) -> Iterable[np.ndarray]:
        for sample in streams[image_set.name]:
            yield pillow_tiles(sample["jpg"], image_set.geometry, normalise)

    return _turns(sets, pictures, repeats)


def with_energon(sets: Sequence[ImageSet], repeats: int, normalise: bool) -> Turn:
    """energon's loader without workers, a crude data set and a cooker; Pillow, NumPy.

    One iterator goes on from turn to turn, as in training: starting one takes a tenth of a second.
    """
    # Its packages come after ours, which it shares (constraints-energon.txt).
    sys.path += [str(path) for path in ENERGON.glob("lib/python*/site-packages")]
    from tools.benchmarks.data.energon_samples import endless

    streams = {s.name: iter(endless(s.energon)) for s in sets}

    def pictures(image_set: ImageSet) -> Iterable[np.ndarray]:
        for sample in itertools.islice(streams[image_set.name], image_set.count):
            yield pillow_tiles(sample.parts["jpg"], image_set.geometry, normalise)

    return _turns(sets, pictures, repeats)


def decode_only(sets: Sequence[ImageSet], repeats: int) -> Turn:
    """The floor: libjpeg-turbo's exact decoding alone (simplejpeg), of bytes in memory."""
    import simplejpeg

    files = {s.name: list(_bytes_by_index(s)()) for s in sets}
    arrays = {s.name: np.empty((s.height, s.width, 3), np.uint8) for s in sets}

    def pictures(image_set: ImageSet) -> Iterable[np.ndarray]:
        for data in files[image_set.name]:
            yield simplejpeg.decode_jpeg(
                data, "RGB", fastdct=False, fastupsample=False, buffer=arrays[image_set.name]
            )

    return _turns(sets, pictures, repeats)


def processor_of(geometry: AnyresGeometry, fast: bool = False) -> Any:
    """transformers' processor as an export's files configure it."""
    from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    side = geometry.tile
    kind: Any = LlavaNextImageProcessorFast if fast else LlavaNextImageProcessor
    return kind(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in geometry.pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )


def pillow_tiles(data: bytes, geometry: AnyresGeometry, normalise: bool) -> np.ndarray:
    """Tiles as transformers' slow processor makes them, with the fewest copies that Pillow and
    NumPy allow: uint8, or float32 within -1..1."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = geometry.tile
    rows, columns = geometry.tile_grid(image.height, image.width)
    out_NCHW = np.empty((1 + rows * columns, 3, side, side), np.uint8)
    base = image.resize((side, side), Image.Resampling.BICUBIC)
    out_NCHW[0] = np.asarray(base).transpose(2, 0, 1)
    height, width, top, left = geometry.resize_box(image.height, image.width)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas[top : top + height, left : left + width] = np.asarray(resized)
    tiles = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    out_NCHW[1:] = tiles.reshape(-1, 3, side, side)
    if not normalise:
        return out_NCHW
    values = np.multiply(out_NCHW, np.float32(2 / 255), dtype=np.float32)
    values -= 1
    return values


def opened(data: bytes) -> Image.Image:
    """As transformers takes pictures."""
    return Image.open(io.BytesIO(data))


def energon_version() -> str:
    """Version of the energon in its environment."""
    (found,) = ENERGON.glob("lib/python*/site-packages/megatron_energon-*.dist-info")
    return found.name.removesuffix(".dist-info").partition("-")[2]


def checksum(pictures: Iterable[Any]) -> int:
    """Sum of the CRC-32 of each picture's uint8 tiles, in whatever order they come; 0 where they
    are something else."""
    return sum(
        crc_of(tiles_NCHW)
        for tiles_NCHW in pictures
        if isinstance(tiles_NCHW, np.ndarray) and tiles_NCHW.dtype == np.uint8
    )


def crc_of(tiles_NCHW: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(tiles_NCHW).data)


def _turns(sets: Sequence[ImageSet], pictures: Pictures, repeats: int) -> Turn:
    """`repeats` passes a turn, so that quick sides are timed over as long as slow ones."""
    rounds = itertools.cycle(sets)
    checks: dict[str, float] = {}

    def turn() -> dict[str, float]:
        chosen = next(rounds)
        if chosen.name not in checks:  # in the warm-up
            checks[chosen.name] = float(checksum(pictures(chosen)))
        count = 0
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            for _tiles in pictures(chosen):
                count += 1
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if count != repeats * chosen.count:
            raise ValueError(f"{count} pictures instead of {repeats} times {chosen.count}")
        return {"seconds": wall, "cpu": cpu, "pictures": count, "checksum": checks[chosen.name]}

    return turn


def new_array(image_set: ImageSet) -> np.ndarray:
    """Room for the tiles of one picture, its pages in memory already."""
    side = image_set.geometry.tile
    return np.zeros((image_set.n_tiles, 3, side, side), np.uint8)


def _bytes_by_index(image_set: ImageSet) -> Callable[[], Iterable[bytes]]:
    from data_shards.manifest import read_manifest
    from data_shards.reader import DescriptorCache, ShardReader

    reader = ShardReader(read_manifest(image_set.folder / "manifest.parquet"), DescriptorCache())
    return lambda: (reader.read(row)[1][0] for row in range(image_set.count))
