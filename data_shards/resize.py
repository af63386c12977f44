"""Resize and tiling by the compiled module `amalia_pixels`, where it is there and equals Pillow.

Its sources are in `data_shards/native`, and explain the arithmetic. Every result is what Pillow 13
computes, bit for bit. Since a Pillow with other arithmetic would make the pixels of a batch depend
on how a machine was set up, the module is compared with the Pillow installed once in every process,
on a few shapes, and not used if anything differs.
"""

import importlib
import logging
import os
import threading
from functools import cache, lru_cache
from types import ModuleType

import numpy as np
import PIL
from PIL import Image

from models.anyres import AnyresGeometry

logger = logging.getLogger(__name__)

VARIABLE = "AMALIA_PIXELS"  # pillow, avx2 or avx512: use that one
PILLOW = "pillow"
INTERFACE = 2  # of the module's function
SLACK = 256  # bytes that must follow the pixels; the module reads whole vectors
MAX_SIDE = 65535  # px
_SLOW = "images are resized by Pillow, several times slower"
# (height, width) before and after, on a canvas of 64 px: what is far apart and near, enlarging, one
# axis only, and the vertical axis first (Pillow 13's rule).
_CHECKED = (
    ((75, 101), (33, 64)),
    ((60, 300), (40, 50)),
    ((40, 700), (30, 64)),
    ((70, 1400), (64, 60)),
    ((20, 3000), (20, 64)),
    ((23, 29), (57, 64)),
    ((64, 140), (64, 61)),
    ((131, 60), (64, 60)),
    ((300, 75), (31, 64)),
)
_lock = threading.Lock()


def backend() -> str:
    """What resizes images in this process: "avx512", "avx2" or "pillow".

    The best there is, or what the environment variable AMALIA_PIXELS names.

    Raises:
        ValueError: AMALIA_PIXELS names something that this machine cannot do.
    """
    with _lock:
        return _chosen(os.environ.get(VARIABLE, ""))


def backends() -> tuple[str, ...]:
    """All that this process can use, the fastest first."""
    with _lock:
        return (*_checked()[0], PILLOW)


@cache
def _chosen(wanted: str) -> str:
    if wanted == PILLOW:
        return PILLOW
    good, problem = _checked()
    if not wanted:
        if problem:
            logger.warning("%s; %s", problem, _SLOW)
        return good[0] if good else PILLOW
    if wanted not in good:
        reason = f" ({problem})" if problem else ""
        raise ValueError(
            f"{VARIABLE}={wanted}, but only {', '.join((*good, PILLOW))} can be used here{reason}; "
            f"unset {VARIABLE}"
        )
    return wanted


@cache
def _checked() -> tuple[tuple[str, ...], str]:
    """Instruction sets that can be used, the fastest first; a problem worth telling, or ""."""
    try:
        module = _module()
    except ImportError as error:
        return (
            (),
            f"amalia_pixels is not compiled ({error}; docs/data/pixels.md says how)",
        )
    if module.INTERFACE != INTERFACE or module.SLACK != SLACK:
        return (), "amalia_pixels is compiled from other sources (make setup compiles it anew)"
    names = tuple(module.instruction_sets())
    good = tuple(name for name in names if _equals_pillow(name))
    if len(good) < len(names):
        return good, (
            f"Pillow {PIL.__version__} does not resize as amalia_pixels does with "
            f"{', '.join(name for name in names if name not in good)}"
        )
    return good, "" if names else "this processor has neither AVX2 nor AVX-512"


@cache
def _module() -> ModuleType:
    return importlib.import_module("amalia_pixels")


def _equals_pillow(instructions: str) -> bool:
    side = 64
    generator = np.random.default_rng(0)
    tiles_NCHW = np.empty((2, 3, side, side), np.uint8)
    for (height, width), size in _CHECKED:
        rgb = generator.integers(0, 256, height * width * 3 + SLACK, np.uint8)
        # Black and white besides: sums beyond 0..255 are cut off.
        rgb[: len(rgb) // 2] = np.where(rgb[: len(rgb) // 2] < 128, 0, 255)
        _module().write_tiles(
            instructions, rgb, (height, width), size, (0, 0), (1, 1), side, tiles_NCHW
        )
        image = Image.fromarray(rgb[:-SLACK].reshape(height, width, 3))
        expected_NCHW = np.zeros_like(tiles_NCHW)
        for expected_CHW, (new_height, new_width) in zip(
            expected_NCHW, ((side, side), size), strict=True
        ):
            resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
            expected_CHW[:, :new_height, :new_width] = np.asarray(resized).transpose(2, 0, 1)
        if not np.array_equal(tiles_NCHW, expected_NCHW):
            return False
    return True


@lru_cache(maxsize=1024)
def _layout(
    geometry: AnyresGeometry, height: int, width: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(new height and width, top and left margin, rows and columns of tiles)."""
    new_height, new_width, top, left = geometry.resize_box(height, width)
    return (new_height, new_width), (top, left), geometry.tile_grid(height, width)


def write_tiles(
    rgb: np.ndarray,
    height: int,
    width: int,
    geometry: AnyresGeometry,
    out_NCHW: np.ndarray,
    instructions: str,
) -> None:
    """Tiles of one image: the squashed base, then the canvas row by row, with black margins.

    Args:
        rgb: uint8 [height * width * 3 + SLACK or more], the pixels and then anything.
        out_NCHW: uint8 [geometry.n_tiles(height, width), 3, tile, tile], overwritten; contiguous.
        instructions: of `backends()`, not "pillow". Sides are at most MAX_SIDE.
    """
    size, margins, grid = _layout(geometry, height, width)
    _module().write_tiles(
        instructions, rgb, (height, width), size, margins, grid, geometry.tile, out_NCHW
    )
