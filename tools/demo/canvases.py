"""Pictures of the demo: scikit-learn's scanned digits, set on canvases of many shapes.

The scans are the test part of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin
and Kaynak, 1998; CC BY 4.0), 1,797 images of 8x8, as `sklearn.datasets.load_digits` carries them.
They are split by scan: no scan is in two of train, dev and held_out. The data does not name its
writers, so one writer may be in all three.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS = ("train", "dev", "held_out")
DEV_SCANS, HELD_OUT_SCANS = 180, 280
SPLIT_SEED = 0  # never the data's seed: other pictures, same split

# Cells (rows, columns) of a canvas, and how often each layout is drawn.
LAYOUTS: dict[tuple[int, int], float] = {
    (1, 1): 0.20,
    (1, 2): 0.15,
    (1, 3): 0.12,
    (1, 4): 0.10,
    (2, 1): 0.12,
    (3, 1): 0.08,
    (4, 1): 0.06,
    (2, 2): 0.17,
}
EMPTY_CELL = 0.15  # so that the shape of a canvas does not tell how many digits it holds
SMALL_CELLS, LARGE_CELLS, LARGE_SHARE = (18.0, 30.5), (32.0, 60.0), 0.2  # heights, pixels
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "preto": (18, 18, 18),
    "vermelho": (150, 22, 22),
    "verde": (20, 105, 36),
    "azul": (24, 44, 160),
    "roxo": (104, 28, 132),
    "castanho": (98, 60, 24),
}
COLOURS = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Scans:
    """Scanned digits of one split: `pixels` uint8 [n, 8, 8] (0 paper, 255 ink), `labels` [n],
    `numbers` [n], their positions in scikit-learn's data."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]


@lru_cache(maxsize=1)
def load_scans() -> dict[str, Scans]:
    """All three splits, by name."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    held_out, dev, train = np.split(order, [HELD_OUT_SCANS, HELD_OUT_SCANS + DEV_SCANS])
    return {
        name: Scans(
            pixels=np.round(digits.images[rows] * (255 / 16)).astype(np.uint8),
            labels=digits.target[rows].astype(np.int64),
            numbers=rows.astype(np.int64),
        )
        for name, rows in zip(SPLITS, (train, dev, held_out), strict=True)
    }


@dataclass(frozen=True)
class Digit:
    """One digit on a canvas: which cell, which scan, and its square box in pixels."""

    row: int
    column: int
    value: int
    scan: int  # row of the split's `Scans`
    left: float
    top: float
    side: float
    angle: float  # degrees


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; the pixels and every right answer follow from it."""

    split: str
    height: int
    width: int
    rows: int
    columns: int
    colour: str
    background: tuple[int, int, int]
    ink: tuple[int, int, int]
    digits: tuple[Digit, ...]  # in reading order: by row, then by column

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(digit.value for digit in self.digits)

    @property
    def layout(self) -> str:
        """One of single, wide, tall, grid."""
        if self.rows == self.columns == 1:
            return "single"
        if self.rows == 1:
            return "wide"
        return "tall" if self.columns == 1 else "grid"


def draw_scene(
    rng: np.random.Generator,
    split: str,
    layout: tuple[int, int] | None = None,
    n_digits: int | None = None,
) -> Scene:
    """A random scene with scans of `split` only.

    Args:
        layout: (rows, columns) of cells; drawn by `LAYOUTS` if None.
        n_digits: how many cells hold a digit; drawn if None. At least one always does.
    """
    scans = load_scans()[split]
    if layout is None:
        layout = list(LAYOUTS)[rng.choice(len(LAYOUTS), p=list(LAYOUTS.values()))]
    rows, columns = layout
    cells = rows * columns
    if n_digits is None:
        n_digits = max(1, int((rng.random(cells) >= EMPTY_CELL).sum()))
    if not 1 <= n_digits <= cells:
        raise ValueError(f"{n_digits} digits do not fit {rows}x{columns} cells; ask for fewer")
    filled = np.sort(rng.choice(cells, n_digits, replace=False))
    # Most cells fit a tile of 32 px, so that every digit has a tile of its own; some are larger,
    # and their digits are cut by the edges between tiles.
    cell_height = rng.uniform(*(LARGE_CELLS if rng.random() < LARGE_SHARE else SMALL_CELLS))
    cell_width = cell_height * rng.uniform(0.95, 1.06)
    # A margin in proportion to the canvas keeps the cells on the tiles after resizing.
    margin = rng.uniform(0.0, 0.06)
    height = max(8, round(rows * cell_height * (1 + margin)))
    width = max(8, round(columns * cell_width * (1 + margin)))
    colour = COLOURS[rng.integers(len(COLOURS))]
    background = _jitter(rng, BACKGROUNDS[colour], 12)
    ink = _jitter(rng, (238, 238, 232), 14)
    pitch_y, pitch_x = height / rows, width / columns
    digits = []
    for cell in filled:
        row, column = divmod(int(cell), columns)
        scan = int(rng.integers(len(scans.labels)))
        side = min(pitch_x, pitch_y) * rng.uniform(0.62, 0.88)
        digits.append(
            Digit(
                row=row,
                column=column,
                value=int(scans.labels[scan]),
                scan=scan,
                left=column * pitch_x + rng.uniform(0, pitch_x - side),
                top=row * pitch_y + rng.uniform(0, pitch_y - side),
                side=side,
                angle=rng.uniform(-8, 8),
            )
        )
    return Scene(split, height, width, rows, columns, colour, background, ink, tuple(digits))


def _jitter(
    rng: np.random.Generator, colour: tuple[int, int, int], width: int
) -> tuple[int, int, int]:
    moved = np.clip(np.array(colour) + rng.integers(-width, width + 1, 3), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `scene.width` x `scene.height` pixels."""
    scans = load_scans()[scene.split]
    canvas = Image.new("RGB", (scene.width, scene.height), scene.background)
    for digit in scene.digits:
        side = max(6, round(digit.side))
        mask = Image.fromarray(scans.pixels[digit.scan])
        mask = mask.resize((side, side), Image.Resampling.BICUBIC)
        mask = mask.rotate(digit.angle, Image.Resampling.BILINEAR)
        canvas.paste(scene.ink, (round(digit.left), round(digit.top)), mask)
    return canvas
