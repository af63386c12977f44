"""The builder's table: both builders store the same, and goals are judged on what was measured."""

import io

import numpy as np
import pytest
from PIL import Image

from conf.schema.data import ImageLimits
from data_shards.image_store import store
from data_shards.images import ImageError
from tools.benchmarks.data import build
from tools.benchmarks.data.build_sides import _with_exif, store_with_pillow
from tools.benchmarks.turns import Turns


def jpeg() -> bytes:
    ramp = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_pillow_builder_stores_the_same_bytes() -> None:
    limits = ImageLimits()
    for data in (jpeg(), _with_exif(jpeg())):
        ours, theirs = store(data, limits), store_with_pillow(data, limits)
        assert (ours.data, ours.width, ours.height) == (theirs.data, theirs.width, theirs.height)
        assert ours.data == jpeg()
    with pytest.raises(ImageError):
        store_with_pillow(jpeg()[:-400], limits)


def turns(ours: float, crc: float = 1.0) -> Turns:
    def report(seconds: float, crc: float) -> dict[str, float]:
        facts = {"samples": 10.0, "megabytes": 1.0, "kept": 9.0, "left_out": 1.0}
        return {**facts, "cpu_seconds": seconds, "shards_crc": crc}

    names = (build.TAR, build.DECODED, build.REENCODED, build.PILLOW)
    reports = {name: [report(1.0, 1.0)] * 3 for name in names}
    return Turns({**reports, build.OURS: [report(ours, crc)] * 3}, 0.0)


def test_what_the_table_says() -> None:
    assert "goal 2, 2.50 (2.50 to 2.50), reached" in build.verdicts(turns(0.4))[0]
    assert "1.25 (1.25 to 1.25), missed" in build.verdicts(turns(0.8))[0]
    assert build.rows_of(turns(0.5))[-1] == [build.OURS, 20.0, 2.0, 50.0, ""]
    assert "9 samples; of 10 rows 1" in build.check_same(turns(0.5))
    with pytest.raises(ValueError, match="do not write the same shards"):
        build.check_same(turns(0.5, crc=2.0))
