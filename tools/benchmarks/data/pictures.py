"""Pictures for the benchmarks: photo-like octave noise, pages of text, charts, as JPEG files.

Synthetic, since nothing may be downloaded; made so that a 1024x768 one takes about 120 KB, as web
photos do, because decoding time follows the entropy-coded bits more than the pixels.
"""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

QUALITY = 88
BASES = 24  # drawn anew; the pictures after them are these, mirrored and rolled, encoded again
_WORDS = (  # Pillow's own font has no accents
    "conta despesa receita total janeiro imagem escola autocarro cidade valor quadro tabela linha "
    "data pessoa casa porto mar vento ponto livro rua comboio"
).split()


def jpegs(count: int, height: int, width: int, seed: int = 0) -> Iterator[bytes]:
    """`count` JPEG files of one size (4:2:0): seven photos in ten, the rest pages and charts.

    The same arguments give the same pixels; the bytes are those of the installed libjpeg.
    """
    bases: list[np.ndarray] = []
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        if number < BASES:
            bases.append(np.asarray(draw(number, generator, height, width)))
            picture = bases[-1]
        else:
            picture = bases[number % BASES]
            if generator.integers(2):
                picture = picture[:, ::-1]
            # By odd numbers of pixels, so that the blocks of 8x8 are other ones.
            shift = 2 * generator.integers(1, min(height, width) // 2, 2) + 1
            picture = np.roll(picture, tuple(shift), (0, 1))
        yield encode(Image.fromarray(picture))


def draw(number: int, generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """One RGB picture; its kind goes by its number."""
    kind = number % 10
    if kind in (3, 8):
        return page(generator, height, width)
    if kind == 6:
        return chart(generator, height, width)
    return photo(generator, height, width)


def encode(image: Image.Image, quality: int = QUALITY) -> bytes:
    """A baseline JPEG with 4:2:0 chroma and no metadata but JFIF."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


def photo(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Noise whose strength falls with frequency as it does in photographs (about 1/f), with soft
    colours, some hard edges and a little grain."""
    light = np.zeros((height, width), np.float32)
    for octave in range(9):
        cells = 2 << octave
        if cells > min(height, width):
            break
        light += _noise(generator, cells, height, width) / cells**0.85
    light = light / light.std() * 42
    for _ in range(6):  # edges
        top, left = generator.integers(0, height), generator.integers(0, width)
        bottom = top + generator.integers(1, height // 2)
        light[top:bottom, left : left + generator.integers(1, width // 2)] += generator.normal(
            0, 25
        )
    light += generator.normal(0, 2.2, light.shape)
    colour = np.stack([_noise(generator, 6, height, width) * 18 for _ in range(3)], axis=-1)
    return Image.fromarray(np.clip(light[..., None] + colour + 118, 0, 255).astype(np.uint8))


def page(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Paragraphs on off-white paper."""
    image = Image.new("RGB", (width, height), (250, 249, 245))
    pen = ImageDraw.Draw(image)
    size = int(generator.integers(13, 22))
    font = ImageFont.load_default(size)
    margin = width // 14
    for top in range(margin, height - margin, int(size * 1.5)):
        if generator.random() < 0.12:
            continue
        words = generator.choice(_WORDS, max(1, int((width - 2 * margin) / (size * 3.4))))
        pen.text((margin, top), " ".join(words), fill=(25, 25, 30), font=font)
    return image


def chart(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Bars and a curve with a grid, an axis and labels."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    left, bottom = width // 12, height - height // 10
    for step in range(10):
        y = bottom - step * (bottom - 20) // 10
        pen.line([(left, y), (width - 20, y)], fill=(220, 220, 225))
        pen.text((8, y - 8), str(step * 10), fill=(60, 60, 60), font=font)
    bars = int(generator.integers(6, 24))
    pitch = (width - 20 - left) / bars
    values = generator.random(bars) * (bottom - 40)
    for number, value in enumerate(values):
        colour = tuple(int(c) for c in generator.integers(40, 220, 3))
        x = left + number * pitch
        pen.rectangle([x + 2, bottom - value, x + pitch * 0.8, bottom], fill=colour)
        pen.text((x + 2, bottom + 6), str(number), fill=(60, 60, 60), font=font)
    points = [(left + (n + 0.4) * pitch, bottom - v * 0.8) for n, v in enumerate(values[::-1])]
    pen.line(points, fill=(200, 30, 30), width=3)
    return image


def _noise(generator: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """Smooth noise with about `cells` hills along the shorter side, float32 [height, width]."""
    scale = cells / min(height, width)
    shape = max(2, round(height * scale)), max(2, round(width * scale))
    coarse = Image.fromarray(generator.normal(0, 1, shape).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
