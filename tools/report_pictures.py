"""Pictures of the report as data URLs: the questions' canvases, and tiles drawn on one of them."""

import base64
import io

import numpy as np
from markupsafe import Markup
from PIL import Image

from models.anyres import AnyresGeometry

_SCALE = 4  # a tile of the demo has 32 px; they are shown four times as large
_MOST = 1600  # px, longest side that is drawn


def data_url(picture: Image.Image) -> str:
    """PNG of a picture as a `data:` URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def canvas(picture: Image.Image, geometry: AnyresGeometry) -> tuple[Image.Image, tuple[int, ...]]:
    """The picture on its anyres canvas, and the box (left, top, right, bottom) that it fills."""
    rows, columns = geometry.tile_grid(picture.height, picture.width)
    height, width, top, left = geometry.resize_box(picture.height, picture.width)
    whole = Image.new("RGB", (columns * geometry.tile, rows * geometry.tile))
    whole.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return whole, (left, top, left + width, top + height)


def tiles_drawing(picture: Image.Image, geometry: AnyresGeometry) -> Markup:
    """SVG: the picture, its base tile, and its canvas with tile borders, patches and padding."""
    tile = geometry.tile
    scale = max(1, min(_SCALE, _MOST // max(geometry.best_resolution(*picture.size[::-1]))))
    whole, box = canvas(picture, geometry)
    base = picture.resize((tile, tile), Image.Resampling.BICUBIC)
    gap, top, side = 26, 22, tile * scale
    label = 78  # px, about as wide as "138 x 46 px" is written
    shown = picture.copy()
    shown.thumbnail((6 * side // 4, 2 * side))
    x_base = max(shown.width, label) + gap
    x_canvas = x_base + side + gap
    width = x_canvas + max(whole.width * scale, 290) + 2
    height = top + max(shown.height, side, whole.height * scale) + 4
    parts = [
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>",
        "<defs><pattern id='pad' width='8' height='8' patternUnits='userSpaceOnUse' "
        "patternTransform='rotate(45)'><rect width='8' height='8' fill='#1a1a1a'/>"
        "<line x1='0' y1='0' x2='0' y2='8' stroke='#9a9a9a' stroke-width='2'/></pattern></defs>",
        _picture(shown, 0, top, shown.width, shown.height),
        _label(0, f"{picture.width} x {picture.height} px"),
        _picture(_enlarged(base, scale), x_base, top, side, side),
        _grid(x_base, top, side, side, geometry.patch * scale, "#ffffff", 0.35, 0.7),
        _grid(x_base, top, side, side, side, "#f0b400", 1, 3),
        _label(x_base, "base tile"),
        _picture(_enlarged(whole, scale), x_canvas, top, whole.width * scale, whole.height * scale),
        _label(x_canvas, _canvas_text(picture, geometry)),
    ]
    for left, upper, right, lower in _padding(whole.size, box):
        parts.append(
            f"<rect x='{x_canvas + left * scale}' y='{top + upper * scale}' "
            f"width='{(right - left) * scale}' height='{(lower - upper) * scale}' "
            "fill='url(#pad)'/>"
        )
    size = (whole.width * scale, whole.height * scale)
    parts.append(_grid(x_canvas, top, *size, geometry.patch * scale, "#ffffff", 0.35, 0.7))
    parts.append(_grid(x_canvas, top, *size, side, "#f0b400", 1, 3))
    return Markup("".join(parts) + "</svg>")


def _canvas_text(picture: Image.Image, geometry: AnyresGeometry) -> str:
    rows, columns = geometry.tile_grid(picture.height, picture.width)
    tokens = geometry.n_tokens(picture.height, picture.width)
    return f"{rows} x {columns} tiles, {tokens} image tokens with the base tile"


def _padding(size: tuple[int, int], box: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The rectangles of a canvas outside `box`, empty ones left out."""
    width, height = size
    left, top, right, bottom = box
    found = [(0, 0, width, top), (0, bottom, width, height)]
    found += [(0, top, left, bottom), (right, top, width, bottom)]
    return [area for area in found if area[2] > area[0] and area[3] > area[1]]


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    pixels = np.asarray(picture.convert("RGB"))
    return Image.fromarray(np.kron(pixels, np.ones((scale, scale, 1), np.uint8)))


def _picture(picture: Image.Image, x: int, y: int, width: int, height: int) -> str:
    return f"<image x='{x}' y='{y}' width='{width}' height='{height}' href='{data_url(picture)}'/>"


def _label(x: int, text: str) -> str:
    return f"<text x='{x}' y='14' class='t'>{text}</text>"


def _grid(
    x: int, y: int, width: int, height: int, step: int, colour: str, opacity: float, stroke: float
) -> str:
    lines = [f"M{x + at},{y}v{height}" for at in range(0, width + 1, step)]
    lines += [f"M{x},{y + at}h{width}" for at in range(0, height + 1, step)]
    return (
        f"<path d='{''.join(lines)}' stroke='{colour}' stroke-width='{stroke}' "
        f"opacity='{opacity}' fill='none'/>"
    )
