"""What lies under each patch of a picture's tiles, and the tiles themselves.

The same geometry as training (`models.anyres`): the base tile first, then the canvas tiles row by
row. Labels come from the scene, so that they are known for pictures that are never drawn.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.anyres import AnyresGeometry
from tools.demo.canvases import Scene

NO_DIGIT = 10  # class of a patch that shows background only
PADDING = 11  # class of a patch outside the picture (anyres pads the canvas with black)
MIN_COVER = 0.3  # share of a patch that a digit's box must cover


def cut_tiles(image: Image.Image, geometry: AnyresGeometry) -> NDArray[np.uint8]:
    """Tiles of one RGB picture, uint8 [n_tiles, side, side, 3], as LlavaNextImageProcessor's."""
    side = geometry.tile
    width, height = image.size
    new_height, new_width, top, left = geometry.resize_box(height, width)
    rows, columns = geometry.tile_grid(height, width)
    canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    base = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return np.concatenate([base[None], tiles])


def patch_labels(scene: Scene, geometry: AnyresGeometry) -> NDArray[np.int64]:
    """What each patch shows: 0-9, `NO_DIGIT` or `PADDING`; int64 [n_tiles * grid * grid].

    Row i is row i of the image's feature table (`AnyresGeometry.feature_rows`).
    """
    side, grid = geometry.tile, geometry.grid
    rows, columns = geometry.tile_grid(scene.height, scene.width)
    base = _label_grid(scene, (0, 0, side, side), (grid, grid), geometry.patch)
    new_height, new_width, top, left = geometry.resize_box(scene.height, scene.width)
    canvas = _label_grid(
        scene, (top, left, new_height, new_width), (rows * grid, columns * grid), geometry.patch
    )
    tiles = canvas.reshape(rows, grid, columns, grid).swapaxes(1, 2).reshape(-1)
    return np.concatenate([base.reshape(-1), tiles])


def _label_grid(
    scene: Scene, box: tuple[int, int, int, int], shape: tuple[int, int], patch: int
) -> NDArray[np.int64]:
    """Labels [rows, columns] of the patches of a canvas; `box` (top, left, height, width) in
    pixels is where the picture lies on it."""
    top, left, height, width = box
    edge_y, edge_x = np.arange(shape[0] + 1) * patch, np.arange(shape[1] + 1) * patch
    inside = np.outer(
        _overlap(edge_y, top, top + height) >= patch / 2,
        _overlap(edge_x, left, left + width) >= patch / 2,
    )
    labels = np.where(inside, NO_DIGIT, PADDING)
    best = np.full(shape, MIN_COVER * patch * patch)
    scale_y, scale_x = height / scene.height, width / scene.width
    for digit in scene.digits:
        y, x = top + digit.top * scale_y, left + digit.left * scale_x
        cover = np.outer(
            _overlap(edge_y, y, y + digit.side * scale_y),
            _overlap(edge_x, x, x + digit.side * scale_x),
        )
        labels = np.where(cover > best, digit.value, labels)
        best = np.maximum(cover, best)
    return labels


def _overlap(edges: NDArray[np.int64], low: float, high: float) -> NDArray[np.float64]:
    """Length that [low, high] shares with each interval between neighbouring edges."""
    return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None)
