"""Every hostile picture ends in the right pixels or in a refusal that says why."""

import io
import re

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_shards.image_store import store
from data_shards.images import ImageError
from tests.data_shards.hostile.pictures import LIMITS, Case, all_cases

CASES = all_cases()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of broken metadata


def test_names_are_there_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_pixels_or_a_reason(case: Case) -> None:
    if case.shown is None:
        with pytest.raises(ImageError) as caught:
            store(case.data, LIMITS)
        assert re.search(case.refused, str(caught.value)), caught.value
        return
    stored = store(case.data, LIMITS)
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == {"jpg": "JPEG", "png": "PNG"}[stored.extension]
    assert image.mode in ("L", "RGB") and not image.info.keys() & {"transparency", "exif", "xmp"}
    assert image.size == (stored.width, stored.height)
    pixels = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels, case.shown)
    if stored.extension == "jpg":
        assert np.array_equal(simplejpeg.decode_jpeg(stored.data), case.shown)
    assert b"Cascais" not in stored.data
    assert store(stored.data, LIMITS).data == stored.data  # there is nothing left to do
