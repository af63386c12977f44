"""The image benchmark: its pictures, what it compares, and what it says of it."""

from pathlib import Path

import numpy as np
import pytest

from data_shards import images as pixels
from models.anyres import AnyresGeometry, pinpoints_up_to
from tools import bench
from tools.benchmarks.data import images, sides
from tools.benchmarks.data.pictures import BASES, jpegs
from tools.benchmarks.data.sets import ImageSet, write_set
from tools.benchmarks.turns import Turns

TINY = AnyresGeometry(tile=32, patch=8, pinpoints=pinpoints_up_to(32, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    found = ImageSet("tiny", 60, 101, TINY, tmp_path_factory.mktemp("tiny") / "set", 4)
    write_set(found, seed=0)
    return found


def test_pictures_are_the_same_again_and_all_different() -> None:
    first, again = list(jpegs(BASES + 6, 48, 64)), list(jpegs(BASES + 6, 48, 64))
    assert first == again and len(set(first)) == len(first)
    assert list(jpegs(2, 48, 64, seed=1)) != first[:2]


def test_large_pictures_weigh_what_photos_do() -> None:
    sizes = [len(data) / 1e3 for data in jpegs(10, 768, 1024)]
    assert 90 < np.mean(sizes) < 150


def test_all_sides_make_the_tiles_that_transformers_makes(
    tiny: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = images.check_equal([tiny], say=lambda message: None)
    assert expected["tiny"] > 0
    for turn in (
        sides.ours([tiny], repeats=2),
        sides.with_webdataset([tiny], repeats=2, normalise=False),
    ):
        report = turn()
        assert report["checksum"] == expected["tiny"] and report["pictures"] == 8
        assert 0 < report["cpu"]
    assert sides.decode_only([tiny], repeats=1)()["pictures"] == 4
    assert sides.with_transformers([tiny], repeats=1)()["checksum"] == 0

    def wrong(*arguments: object) -> None:
        right(*arguments)  # type: ignore[arg-type]
        out_NCHW = arguments[-1]
        assert isinstance(out_NCHW, np.ndarray)
        out_NCHW[-1, 0, 0, 5] ^= 1

    right = pixels.write_tiles_from
    monkeypatch.setattr(pixels, "write_tiles_from", wrong)
    with pytest.raises(ValueError, match="picture 0 differs from transformers'"):
        images.check_equal([tiny], say=lambda message: None)


def test_normalised_rows_are_what_the_model_is_fed_but_for_rounding(tiny: ImageSet) -> None:
    (data,) = jpegs(1, 60, 101)
    values = sides.pillow_tiles(data, TINY, normalise=True)
    theirs = sides.processor_of(TINY)(sides.opened(data), return_tensors="np")["pixel_values"][0]
    assert values.dtype == np.float32 and np.abs(values - theirs).max() < 1e-6


def _report(cpu: float, pictures: float = 10, checksum: float = 7) -> dict[str, float]:
    return {"seconds": cpu, "cpu": cpu, "pictures": pictures, "checksum": checksum}


def test_turns_belong_to_their_set_and_goals_are_judged(tmp_path: Path) -> None:
    sets = images.image_sets(tmp_path, 0.1)
    assert [s.n_tiles for s in sets[:4]] == [7, 13, 13, 10]
    # Two rounds over the sets; the set's number is in the time.
    ours = [_report(0.1 + n / 100) for _ in range(2) for n in range(len(sets))]
    slow = [_report(1.0 + n) for _ in range(2) for n in range(len(sets))]
    taken = Turns({images.OURS: ours, images.SLOW: slow, images.FLOOR: ours}, others=0.0)
    divided = images.by_set(taken, sets)
    assert [r["cpu"] for r in divided[images.LARGE].reports[images.SLOW]] == [3.0, 3.0]
    said = images.verdicts(divided)
    assert "goal at least 9 times, reached: 10.00" in said[0]
    assert "not measured: `make setup-energon`" in said[1]
    assert images.rows_of(divided)[0][1] == "10 (10.0)"
    taken.others = 0.5
    assert "not judged" in images.verdicts(images.by_set(taken, sets))[0]
    images.check_sums(divided, dict.fromkeys(divided, 7.0))
    for wrong in (8.0, 0.0):
        with pytest.raises(ValueError, match="ours makes other tiles of the 1024x768 pictures"):
            images.check_sums(divided, dict.fromkeys(divided, wrong))


def test_every_section_of_a_page_can_be_found() -> None:
    for group in bench.GROUPS.values():
        for place in group.sections.values():
            assert callable(bench._measure(place)), place
    with pytest.raises(ValueError, match="bench=tea is none of speed, data"):
        bench.main(["bench=tea"])
    with pytest.raises(ValueError, match="only=stage2 is none of images"):
        bench.main(["bench=data", "only=stage2"])
