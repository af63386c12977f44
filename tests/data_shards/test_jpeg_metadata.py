"""Metadata goes and pixels stay, for every way of coding and every decoder in use."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_shards.images import ImageError
from data_shards.jpeg_metadata import take_apart
from tests.data_shards import toys
from tests.data_shards.hostile.file_parts import after_start, segment, without_jfif

CODINGS: dict[str, dict[str, Any]] = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "rgb": {"keep_rgb": True},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of broken metadata
THUMBNAIL = toys.encoded(toys.picture(9, 16, 16), "JPEG")
SECRET = b"Rua do Almada 9, Porto"
SEGMENTS = (
    segment(0xE0, b"JFXX\0\x10" + THUMBNAIL),
    segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0" + SECRET),
    segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRET + b"</x>"),
    segment(0xE2, b"ICC_PROFILE\0\1\1" + SECRET),
    segment(0xE2, b"MPF\0II*\0" + SECRET),
    segment(0xED, b"Photoshop 3.0\0" + SECRET),
    segment(0xEF, SECRET),
    b"\xff\xff\xff" + segment(0xFE, SECRET),
)


def pixels(data: bytes) -> list[np.ndarray]:
    """What each decoder makes of it."""
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), simplejpeg.decode_jpeg(data)]


@pytest.mark.parametrize("marks", ["jfif", "adobe-0", "adobe-1", "nothing"])
@pytest.mark.parametrize("coding", CODINGS)
def test_same_pixels_without_metadata(coding: str, marks: str) -> None:
    plain = toys.encoded(toys.picture(1, 30, 41), "JPEG", **CODINGS[coding])
    if marks != "jfif" and plain[2:4] == b"\xff\xe0":
        plain = without_jfif(plain)
    if marks.startswith("adobe"):
        transform = bytes([int(marks[-1])])
        plain = after_start(plain, segment(0xEE, b"Adobe\0\x64\0\0\0\0" + transform))
    heavy = after_start(plain, *SEGMENTS)[:-2] + b"\xff\xff\xd9" + THUMBNAIL + SECRET
    parts = take_apart(heavy)
    assert SECRET not in parts.bare and THUMBNAIL not in parts.bare
    assert SECRET in parts.exif and SECRET in parts.xmp
    assert (parts.height, parts.width, parts.components) == (30, 41, 3)
    for before, after in zip(pixels(heavy), pixels(parts.bare), strict=True):
        assert np.array_equal(before, after)
    assert take_apart(parts.bare).bare == parts.bare == take_apart(plain).bare


def test_a_thumbnail_in_the_jfif_segment_goes() -> None:
    plain = toys.encoded(toys.picture(1, 30, 41), "JPEG")
    jfif = segment(0xE0, plain[6:18] + b"\x02\x01" + SECRET[:6])
    with_thumbnail = plain[:2] + jfif + plain[20:]
    assert take_apart(with_thumbnail).bare == plain


def test_metadata_between_scans_goes() -> None:
    plain = toys.encoded(toys.picture(1, 30, 41), "JPEG", progressive=True)
    second = plain.index(b"\xff\xda", plain.index(b"\xff\xda") + 2)
    # Tables may stand before a scan: put the comment before those.
    marker = plain.rindex(b"\xff\xc4", 0, second) if b"\xff\xc4" in plain[:second] else second
    heavy = plain[:marker] + SEGMENTS[-1] + plain[marker:]
    assert take_apart(heavy).bare == plain


def test_exif_longer_than_a_segment_is_put_together() -> None:
    plain = toys.encoded(toys.picture(1, 30, 41), "JPEG")
    first = segment(0xE1, b"Exif\0\0" + b"a" * 100)
    data = after_start(plain, first, segment(0xE1, b"Exif\0\0" + b"b" * 50))
    assert take_apart(data).exif == b"a" * 100 + b"b" * 50
    assert Image.open(io.BytesIO(data)).info["exif"] == b"Exif\0\0" + b"a" * 100 + b"b" * 50


def test_every_cut_is_noticed() -> None:
    whole = toys.encoded(toys.picture(1, 30, 41), "JPEG")
    for length in range(len(whole)):
        with pytest.raises(ImageError):
            take_apart(whole[:length])
