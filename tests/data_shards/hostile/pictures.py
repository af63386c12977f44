"""Hostile and unusual image files, each with the pixels that must come of it or why it is refused.

What must come of them is made by Pillow from the pixels that were drawn, or by its own reading of
the file; never by the code under test.
"""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from conf.schema.data import ImageLimits
from tests.data_shards import toys
from tests.data_shards.hostile.file_parts import (
    after_start,
    chunks_of,
    end,
    header,
    png,
    rows,
    segment,
)

LIMITS = ImageLimits(max_pixels=1_000_000, min_side=16, max_aspect=20, max_bytes=4 << 20)
HEIGHT, WIDTH = 24, 36


@dataclass(frozen=True)
class Case:
    """One file: `shown` is uint8 [height, width, 3], or None where it is `refused` (a regex)."""

    name: str
    data: bytes
    shown: np.ndarray | None = None
    refused: str = ""


def drawn(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return toys.picture(seed, height, width)


def shown_by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def on_white(image: Image.Image) -> np.ndarray:
    """Pillow's own paste through the alpha channel, onto white."""
    page = Image.new("RGB", image.size, "white")
    page.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return np.asarray(page)


@functools.cache
def all_cases() -> list[Case]:
    makers: list[Callable[[], Iterator[Case]]] = [
        turned,
        transparent,
        deep,
        colours,
        animated,
        sizes,
        bombs,
        broken,
    ]
    return [case for make in makers for case in make()]


def turned() -> Iterator[Case]:
    """Every orientation, in every format that can tell one, in both byte orders."""
    for value in range(1, 9):
        for order in ("<", ">"):
            exif = Image.Exif()
            exif.endian = order
            exif[0x0112] = value
            exif[0x010E] = "uma praia em Cascais"
            for form, options in (
                ("JPEG", {"quality": 95}),
                ("PNG", {}),
                ("WEBP", {"lossless": True}),
                ("TIFF", {}),
            ):
                data = toys.encoded(drawn(), form, exif=exif.tobytes(), **options)
                picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
                name = f"exif-{value}-{'le' if order == '<' else 'be'}.{form.lower()}"
                yield Case(name, data, np.asarray(picture.convert("RGB")))
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = toys.encoded(drawn(), "JPEG", xmp=packet)
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture.size == (HEIGHT, WIDTH)
    yield Case("xmp-6.jpeg", data, np.asarray(picture))
    plain = toys.encoded(drawn(), "JPEG")
    broken = after_start(plain, segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    yield Case("exif-broken.jpeg", broken, shown_by_pillow(plain))
    exif = Image.Exif()
    exif[0x0112] = 77
    yield Case("exif-77.png", toys.encoded(drawn(), exif=exif), np.asarray(drawn()))


def transparent() -> Iterator[Case]:
    alpha = Image.fromarray(np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype("u1"))
    coloured = drawn().convert("RGBA")
    coloured.putalpha(alpha)
    grey = drawn().convert("LA")
    grey.putalpha(alpha)
    for form in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        yield Case(
            f"alpha.{form.lower()}", toys.encoded(coloured, form, **options), on_white(coloured)
        )
    yield Case("alpha-grey.png", toys.encoded(grey), on_white(grey.convert("RGBA")))
    hidden = drawn().convert("RGBA")
    hidden.putalpha(0)
    yield Case("all-hidden.png", toys.encoded(hidden), np.full((HEIGHT, WIDTH, 3), 255, np.uint8))
    palette = drawn().quantize(64)
    shown = np.array(palette.convert("RGB"))
    shown[np.asarray(palette) == 7] = 255
    yield Case("palette-one-hidden.png", toys.encoded(palette, transparency=7), shown)
    yield Case("palette-one-hidden.gif", *gif_with_hole())
    alphas = bytes(range(0, 256, 4))
    yield Case(
        "palette-alphas.png",
        toys.encoded(palette, transparency=alphas),
        on_white(with_alphas(palette, alphas)),
    )
    yield Case("colour-key.png", *colour_key())
    for depth in (1, 2, 4, 8):
        yield Case(f"grey-key-{depth}.png", *grey_key(depth))


def gif_with_hole() -> tuple[bytes, np.ndarray]:
    pixels = np.asarray(drawn().convert("L")) // 32
    image = Image.fromarray(pixels)
    image = image.convert("P")
    image.putpalette([n for level in range(8) for n in (level * 30, 255 - level * 30, 9)])
    data = toys.encoded(image, "GIF", transparency=3)
    shown = np.stack([pixels * 30, 255 - pixels * 30, np.full_like(pixels, 9)], -1)
    shown[pixels == 3] = 255
    return data, shown


def with_alphas(palette: Image.Image, alphas: bytes) -> Image.Image:
    coloured = palette.convert("RGB").convert("RGBA")
    coloured.putalpha(Image.fromarray(np.frombuffer(alphas, np.uint8)[np.asarray(palette)]))
    return coloured


def colour_key() -> tuple[bytes, np.ndarray]:
    pixels = np.asarray(drawn()).copy()
    pixels[:9] = (10, 20, 30)
    data = toys.encoded(Image.fromarray(pixels), transparency=(10, 20, 30))
    pixels[:9] = 255
    return data, pixels


def grey_key(depth: int) -> tuple[bytes, np.ndarray]:
    """Grey of 1, 2, 4 or 8 bits where one level stands for transparency."""
    width, top = 16, 2**depth - 1
    levels = np.random.default_rng(depth).integers(0, top + 1, (16, width)).astype(np.uint8)
    bits = np.unpackbits(levels[..., None], axis=-1)[..., 8 - depth :].reshape(16, -1)
    key = min(1, top)
    tail = [(b"tRNS", struct.pack(">H", key)), rows(np.packbits(bits, axis=1)), end()]
    shown = (levels.astype(int) * 255 // top).astype(np.uint8)
    shown[levels == key] = 255
    return png(header(width, 16, depth, 0), *tail), np.repeat(shown[..., None], 3, -1)


def deep() -> Iterator[Case]:
    """16 bits: the high byte of each sample, never clipped."""
    generator = np.random.default_rng(1)
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        samples = generator.integers(0, 1 << 16, (HEIGHT, WIDTH, channels)).astype(">u2")
        if channels in (2, 4):
            samples[..., -1] = 0xFFFF
        raw = samples.view(np.uint8).reshape(HEIGHT, -1)
        high = (samples >> 8).astype(np.uint8)
        shown = high[..., :3] if channels > 2 else np.repeat(high[..., :1], 3, -1)
        data = png(header(WIDTH, HEIGHT, 16, colour), rows(raw), end())
        yield Case(f"deep-{colour}.png", data, shown)
        if colour == 0:
            grey = Image.fromarray(samples[..., 0].astype(np.uint16))
            yield Case("deep.tiff", toys.encoded(grey, "TIFF"), shown)
            key = struct.pack(">H", int(samples[3, 4, 0]))
            hole = np.where(samples == samples[3, 4, 0], 255, shown)
            data = png(header(WIDTH, HEIGHT, 16, 0), (b"tRNS", key), rows(raw), end())
            yield Case("deep-key.png", data, hole.astype(np.uint8))
        if colour == 2:
            data = png(header(WIDTH, HEIGHT, 16, 2), (b"tRNS", b"\0" * 6), rows(raw), end())
            yield Case("deep-colour-key.png", data, refused="transparent colour")
    inverted = toys.encoded(grey, "TIFF", tiffinfo={262: 0})
    yield Case("deep-white-is-zero.tiff", inverted, 255 - np.repeat(high_of(grey), 3, -1))
    floats = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32))
    yield Case("float.tiff", toys.encoded(floats, "TIFF"), refused="mode F has no known range")
    wide = Image.fromarray(np.zeros((HEIGHT, WIDTH), np.int32))
    yield Case("int32.tiff", toys.encoded(wide, "TIFF"), refused="mode I has no known range")


def high_of(grey: Image.Image) -> np.ndarray:
    return (np.asarray(grey)[..., None] >> 8).astype(np.uint8)


def colours() -> Iterator[Case]:
    inks = drawn().convert("CMYK")
    for form in ("JPEG", "TIFF"):
        data = toys.encoded(inks, form)
        yield Case(f"cmyk.{form.lower()}", data, shown_by_pillow(data))
    # Adobe's transform 2 says YCCK: the same coded numbers are other inks.
    data = toys.encoded(inks, "JPEG")
    at = data.index(b"Adobe")
    data = data[: at + 11] + b"\2" + data[at + 12 :]
    yield Case("ycck.jpeg", data, shown_by_pillow(data))
    plain = toys.encoded(drawn(), "JPEG")
    coded_rgb = toys.encoded(drawn(), "JPEG", keep_rgb=True)
    yield Case("jpeg-coded-as-rgb.jpeg", coded_rgb, shown_by_pillow(coded_rgb))
    profile = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(200))
    for depth, colour, channels in ((8, 2, 3), (4, 0, 1)):
        yield Case(f"interlaced-{depth}.png", *both(interlaced(depth, colour, channels)))
    yield Case("with-profile.jpeg", after_start(plain, profile), shown_by_pillow(plain))
    yield Case("factors.jpeg", *both(with_factors_that_have_no_name()))
    yield Case("grey.jpeg", *both(toys.encoded(drawn().convert("L"), "JPEG")))
    for mode, form in (("1", "PNG"), ("P", "PNG"), ("1", "TIFF"), ("P", "BMP"), ("1", "GIF")):
        data = toys.encoded(drawn().convert(mode), form)
        yield Case(f"mode-{mode}.{form.lower()}", data, shown_by_pillow(data))
    data = toys.encoded(drawn().convert("LAB"), "TIFF")
    yield Case("lab.tiff", data, shown=shown_by_pillow(data))
    data = toys.encoded(drawn().convert("YCbCr"), "TIFF")
    yield Case("ycbcr.tiff", data, shown_by_pillow(data))


def interlaced(depth: int, colour: int, channels: int) -> bytes:
    """Adam7 (Pillow does not write it): noise in the seven passes."""
    width, height, coded = 37, 29, b""
    generator = np.random.default_rng(depth)
    for left, top, across, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):  # fmt: skip
        size = -(-len(range(left, width, across)) * channels * depth // 8)
        for _ in range(top, height, down):
            coded += b"\0" + generator.bytes(size)
    head = b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 1)
    return png(head, (b"IDAT", zlib.compress(coded)), end())


def with_factors_that_have_no_name() -> bytes:
    """24 x 16 px of grey, the first component sampled three times as finely across as the others:
    ten blocks, each the codes of no difference and of no detail in the luminance tables."""
    data = bytearray(toys.encoded(Image.new("RGB", (24, 16)), "JPEG", subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 11] = 0x31
    for component in range(3):
        data[scan + 6 + 2 * component] = 0x00
    return bytes(data[: scan + 14]) + int("001010" * 10 + "1111", 2).to_bytes(8) + b"\xff\xd9"


def both(data: bytes) -> tuple[bytes, np.ndarray]:
    return data, shown_by_pillow(data)


def animated() -> Iterator[Case]:
    """The first picture of several."""
    frames = [drawn(n) for n in range(1, 4)]
    first = np.asarray(drawn())
    for form, options in (
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("MPO", {}),
    ):
        data = toys.encoded(drawn(), form, save_all=True, append_images=frames, **options)
        shown = shown_by_pillow(data) if form in ("GIF", "MPO") else first
        yield Case(f"frames.{form.lower()}", data, shown)


def sizes() -> Iterator[Case]:
    for width, height, why in (
        (1, 1, "min_side=16 px"),
        (1, 5000, "min_side=16 px"),
        (5000, 1, "min_side=16 px"),
        (15, 40, "min_side=16 px"),
        (16, 321, "max_aspect=20 times"),
        (1001, 1000, "1001x1000 px are more than data.images.max_pixels"),
    ):
        for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
            data = toys.encoded(Image.new("RGB", (width, height), "red"), form)
            yield Case(f"{width}x{height}.{form.lower()}", data, refused=why)
    exact = drawn(0, 16, 320)
    yield Case("16x320.png", toys.encoded(exact), np.asarray(exact))


def bombs() -> Iterator[Case]:
    """A few bytes that state or unpack to very many."""
    too_many = "are more than data.images.max_pixels"
    zeros = (b"IDAT", zlib.compress(b"\0" * 1000))
    yield Case("bomb.png", png(header(20_000, 20_000), zeros, end()), refused=too_many)
    yield Case("bomb-2-31.png", png(header(2**31 - 1, 2**31 - 1), zeros, end()), refused=too_many)
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (8 << 20)))
    good = chunks_of(toys.encoded(drawn()))
    yield Case("text-bomb.png", png(good[0], text, *good[1:]), np.asarray(drawn()))
    exif = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n" * (64 << 20)))
    yield Case("exif-bomb.png", png(good[0], exif, *good[1:]), np.asarray(drawn()))
    profile = (b"iCCP", b"x\0\0" + zlib.compress(bytes(64 << 20)))
    yield Case("profile-bomb.png", png(good[0], profile, *good[1:]), np.asarray(drawn()))
    jpeg = toys.encoded(drawn(), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    huge = jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]
    yield Case("bomb.jpeg", huge, refused=too_many)
    progressive = toys.encoded(drawn(), "JPEG", progressive=True)
    last = progressive.rindex(b"\xff\xda")
    scans = progressive[:-2] + progressive[last:-2] * 200 + b"\xff\xd9"
    yield Case("scan-bomb.jpeg", scans, refused="over 100 scans")
    too_many += "|more pixels than Pillow takes for safe"
    for form, patch in (
        ("WEBP", webp_states),
        ("GIF", gif_states),
        ("TIFF", tiff_states),
        ("BMP", bmp_states),
    ):
        data = patch(toys.encoded(drawn(), form, **({"lossless": True} if form == "WEBP" else {})))
        yield Case(f"bomb.{form.lower()}", data, refused=too_many)
    with_canvas = toys.encoded(drawn(), "WEBP", exif=Image.Exif(), lossless=True, xmp=b"<x/>")
    assert with_canvas[12:16] == b"VP8X"
    at = 24
    data = with_canvas[:at] + b"\xff\x3f\0" * 2 + with_canvas[at + 6 :]
    yield Case("bomb-canvas.webp", data, refused=too_many)
    yield Case("too-many-bytes.png", toys.encoded(drawn()) + bytes(4 << 20), refused="max_bytes")


def webp_states(data: bytes) -> bytes:
    assert data[12:16] == b"VP8L"
    bits = int.from_bytes(data[21:25], "little") | 0xFFFFFFF
    return data[:21] + bits.to_bytes(4, "little") + data[25:]


def gif_states(data: bytes) -> bytes:
    return data[:6] + b"\xff\xff\xff\xff" + data[10:]


def bmp_states(data: bytes) -> bytes:
    return data[:18] + struct.pack("<ii", 30_000, 30_000) + data[26:]


def tiff_states(data: bytes) -> bytes:
    """The same file, stating 30,000 x 30,000 px in its directory."""
    out = bytearray(data)
    place = int.from_bytes(data[4:8], "little")
    for n in range(int.from_bytes(data[place : place + 2], "little")):
        entry = place + 2 + 12 * n
        if int.from_bytes(data[entry : entry + 2], "little") in (256, 257):
            out[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 30_000)
    return bytes(out)


def broken() -> Iterator[Case]:
    """Truncated, damaged, or no image at all."""
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = toys.encoded(drawn(3, 64, 64), form)
        for share in (0.05, 0.3, 0.6, 0.9):
            cut = data[: int(len(data) * share)]
            yield Case(f"cut-{share:g}.{form.lower()}", cut, refused="")
    jpeg = toys.encoded(drawn(3, 64, 64), "JPEG")
    yield Case("no-end.jpeg", jpeg[:-2], refused="truncated")
    yield Case("scan-cut-and-ended.jpeg", jpeg[:-200] + b"\xff\xd9", refused="[Pp]remature")
    junk = jpeg[:-2] + b"junk" * 50 + b"\xff\xd9"
    yield Case("junk-in-scan.jpeg", junk, refused="xtraneous")
    progressive = toys.encoded(drawn(3, 64, 64), "JPEG", progressive=True)
    yield Case(
        "cut-and-ended-progressive.jpeg", progressive[:-99] + b"\xff\xd9", refused="[Pp]remature"
    )
    frame = jpeg.index(b"\xff\xc0")
    twelve = jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]
    yield Case("twelve-bits.jpeg", twelve, refused="12 bits")
    for marker, why in ((0xC3, "lossless"), (0xC9, "arithmetic"), (0xF7, "marker 0xF7")):
        other = jpeg[: frame + 1] + bytes([marker]) + jpeg[frame + 2 :]
        yield Case(f"frame-{marker:x}.jpeg", other, refused=why)
    stop = frame + 2 + int.from_bytes(jpeg[frame + 2 : frame + 4])
    yield Case("two-sizes.jpeg", jpeg[:stop] + jpeg[frame:stop] + jpeg[stop:], refused="two sizes")
    whole = chunks_of(toys.encoded(drawn(3, 64, 64)))
    yield Case("no-end.png", png(*whole[:-1]), refused="truncated")
    yield Case("no-data.png", png(whole[0], whole[-1]), refused="lacks a chunk")
    two = png(whole[0], whole[0], *whole[1:])
    yield Case("two-headers.png", two, refused="twice")
    yield Case("critical.png", png(whole[0], (b"EVIL", b""), *whole[1:]), refused="EVIL")
    short = png(header(64, 64), (b"IDAT", zlib.compress(b"\0" * 193 * 10)), whole[-1])
    yield Case("few-rows.png", short, refused="not all of the 12352 bytes")
    many = png(header(64, 64), (b"IDAT", zlib.compress(bytes(193 * 64 + 1))), whole[-1])
    yield Case("many-rows.png", many, refused="over the 12352 bytes")
    packed = bytearray(zlib.compress(bytes(193 * 64)))
    packed[-1] ^= 1
    data = png(header(64, 64), (b"IDAT", bytes(packed)), whole[-1])
    yield Case("wrong-sum.png", data, refused="incorrect data check")
    for name, content in (
        ("depth", header(64, 64, 3)),
        ("colour", header(64, 64, 8, 5)),
        ("filter", (b"IHDR", whole[0][1][:11] + b"\1" + whole[0][1][12:])),
    ):
        data = png(content, *whole[1:])
        yield Case(f"wrong-{name}.png", data, refused="coding that does not exist")
    for name, data in (
        ("empty", b""),
        ("zeros", bytes(100)),
        ("only-a-name.gif", b"GIF89a"),
        ("page.pdf", b"%PDF-1.4"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
        ("page.html", b"<html><body>404 Not Found</body></html>"),
        ("program.eps", toys.encoded(drawn(), "EPS")),
        ("riff.wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)),
        ("link-to-a-file", b"/etc/passwd"),
    ):
        yield Case(name, data, refused="not a readable image")
