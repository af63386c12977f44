"""LLaVA-NeXT tiling geometry, exactly as transformers 4.57.6 computes it.

Sources: `select_best_resolution` and `get_patch_output_size` (image_processing_utils.py),
`LlavaNextImageProcessor._get_padding_size` (image_processing_llava_next.py), `unpad_image` and
`LlavaNextModel.pack_image_features` (modeling_llava_next.py). Sizes are (height, width) in pixels
throughout. No torch here: data loaders and login nodes import this file.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from conf.schema.model import ModelConfig

NEWLINE = -1  # stands for the `image_newline` row in `feature_rows`


def pinpoints_up_to(tile: int, n: int) -> tuple[tuple[int, int], ...]:
    """Every (a*tile, b*tile) with a, b >= 1 and a*b <= n; a is the outer loop, b the inner one.

    The order is part of the geometry: of two equally good resolutions the earlier one wins.
    """
    return tuple(
        (a * tile, b * tile) for a in range(1, n + 1) for b in range(1, n + 1) if a * b <= n
    )


@dataclass(frozen=True)
class AnyresGeometry:
    """How an image of any size becomes tiles, and tiles become image tokens.

    Attributes:
        tile: side of one tile, pixels.
        patch: side of one patch, pixels; what it leaves over of a tile (384 = 27*14 + 6) is
            never looked at, as in SigLIP's strided convolution.
        pinpoints: canvas sizes allowed, (height, width) in pixels, multiples of `tile`,
            in the order of `image_grid_pinpoints`.

    Raises:
        ValueError: a patch larger than the tile, or a pinpoint that tiles do not divide.
    """

    tile: int
    patch: int
    pinpoints: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 1 <= self.patch <= self.tile:
            raise ValueError(
                f"patch side {self.patch} px is not between 1 and the tile side {self.tile} px; "
                "change model.vision.patch_size"
            )
        if not self.pinpoints:
            raise ValueError("no pinpoints; set model.max_tiles or model.pinpoints")
        for height, width in self.pinpoints:
            if height < 1 or width < 1 or height % self.tile or width % self.tile:
                raise ValueError(
                    f"pinpoint ({height}, {width}) is not two positive multiples of the tile side "
                    f"{self.tile}; change model.pinpoints"
                )

    @classmethod
    def from_model(cls, model: ModelConfig) -> "AnyresGeometry":
        """Geometry of a configured model."""
        tile = model.vision.image_size
        if model.pinpoints is None:
            pinpoints = pinpoints_up_to(tile, model.max_tiles)
        else:
            pinpoints = tuple((int(height), int(width)) for height, width in model.pinpoints)
        return cls(tile=tile, patch=model.vision.patch_size, pinpoints=pinpoints)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    def best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """Canvas (height, width) that keeps most of the image's pixels, then wastes fewest.

        An image so elongated that no canvas keeps a pixel of it gets the smallest canvas, and
        `n_tokens` may then count no grid row at all: transformers does the same.

        Raises:
            ValueError: a size below 1 px.
        """
        if height < 1 or width < 1:
            raise ValueError(f"image size {height}x{width} px is empty; drop the image")
        best = self.pinpoints[0]
        most, least_waste = 0, math.inf
        for canvas_height, canvas_width in self.pinpoints:
            scale = min(canvas_width / width, canvas_height / height)
            kept = min(int(width * scale) * int(height * scale), height * width)
            waste = canvas_height * canvas_width - kept
            if kept > most or (kept == most and waste < least_waste):
                most, least_waste, best = kept, waste, (canvas_height, canvas_width)
        return best

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tiles (rows, columns) of the canvas, without the base tile."""
        canvas_height, canvas_width = self.best_resolution(height, width)
        return canvas_height // self.tile, canvas_width // self.tile

    def n_tiles(self, height: int, width: int) -> int:
        """Tiles of one image: the squashed base tile plus the canvas."""
        rows, columns = self.tile_grid(height, width)
        return 1 + rows * columns

    def unpadded_grid(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Features left on the canvas after `unpad_image`: (rows, columns, top, left)."""
        tile_rows, tile_columns = self.tile_grid(height, width)
        rows, columns = tile_rows * self.grid, tile_columns * self.grid
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            top = (rows - kept) // 2
            return rows - 2 * top, columns, top, 0
        kept = int(round(width * (rows / height), 7))
        left = (columns - kept) // 2
        return rows, columns - 2 * left, 0, left

    def n_tokens(self, height: int, width: int) -> int:
        """Image tokens of one image: base tile, unpadded grid, one newline per grid row."""
        rows, columns, _, _ = self.unpadded_grid(height, width)
        return self.grid * self.grid + rows * (columns + 1)

    def resize_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Resized image on its canvas, pixels: (new_height, new_width, top, left)."""
        canvas_height, canvas_width = self.best_resolution(height, width)
        scale_width, scale_height = canvas_width / width, canvas_height / height
        if scale_width < scale_height:
            new_width = canvas_width
            new_height = min(math.ceil(height * scale_width), canvas_height)
        else:
            new_height = canvas_height
            new_width = min(math.ceil(width * scale_height), canvas_width)
        return (
            new_height,
            new_width,
            (canvas_height - new_height) // 2,
            (canvas_width - new_width) // 2,
        )

    def feature_rows(self, height: int, width: int) -> np.ndarray:
        """Row of the image's feature table that stands at each of its image tokens.

        The table is the connector's output for the image's tiles, laid end to end:
        `n_tiles * grid * grid` rows, base tile first, then tiles row by row.

        Returns:
            int64 [n_tokens]; -1 (`NEWLINE`) where `image_newline` stands.
        """
        side = self.grid
        tile_rows, tile_columns = self.tile_grid(height, width)
        rows, columns, top, left = self.unpadded_grid(height, width)
        # [tile row, tile column, row in tile, column in tile] -> the canvas of features
        numbers = np.arange(tile_rows * tile_columns * side * side, dtype=np.int64) + side * side
        tiles = numbers.reshape(tile_rows, tile_columns, side, side)
        canvas = tiles.transpose(0, 2, 1, 3).reshape(tile_rows * side, tile_columns * side)
        table = np.full((rows, columns + 1), NEWLINE, dtype=np.int64)
        table[:, :columns] = canvas[top : top + rows, left : left + columns]
        return np.concatenate([np.arange(side * side, dtype=np.int64), table.reshape(-1)])

    def max_tokens(self) -> int:
        """Most image tokens that any image can have: the largest canvas, nothing unpadded."""
        side = self.grid
        return side * side + max(
            (height // self.tile * side) * (width // self.tile * side + 1)
            for height, width in self.pinpoints
        )

    def digest(self) -> str:
        """SHA-256 (hex) of tile, patch and pinpoints; what manifests and checkpoints compare."""
        content = {"tile": self.tile, "patch": self.patch, "pinpoints": self.pinpoints}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
