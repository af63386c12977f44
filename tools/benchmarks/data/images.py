"""From an archive to tiles: our path beside transformers, webdataset and energon."""

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import compose
from models.anyres import AnyresGeometry
from tools.benchmarks import machine
from tools.benchmarks.data import sides
from tools.benchmarks.data.sets import NINE, NO_ENERGON, ImageSet, prepare_energon, write_set
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, Turns, spread, take_turns

OURS, FALLBACK = "ours", "ours, Pillow instead of compiled code"
SLOW, FAST = "transformers, slow processor", "transformers, fast processor (torch)"
WEBDATASET, WEBDATASET_U8 = "webdataset + Pillow", "webdataset + Pillow, uint8"
ENERGON, ENERGON_U8 = "energon + Pillow", "energon + Pillow, uint8"
FLOOR = "JPEG decoding alone"
UINT8 = {OURS, FALLBACK, WEBDATASET_U8, ENERGON_U8}  # sides that make the same bytes
SMALL, LARGE, LARGE_NINE = "1024x768", "2048x1536", "2048x1536, 3x3"
# (ours, against, on which pictures, at least this many times as fast)
GOALS = (
    (OURS, SLOW, SMALL, 9.0),
    (OURS, ENERGON, SMALL, 5.0),
    (OURS, SLOW, LARGE, 6.0),
    (OURS, SLOW, LARGE_NINE, 6.0),
    (OURS, FLOOR, SMALL, 0.55),
    (OURS, FLOOR, LARGE, 0.55),
    (OURS, FLOOR, LARGE_NINE, 0.55),
)
PACKAGES = ("pillow", "simplejpeg", "webdataset")
METHOD = """
CPU time of one process for one picture (all its threads, the system's part included), from an
archive in the page cache to tiles, every side in a process of its own, on the same archives, in
turn; medians over the turns. Milliseconds, and how many times the speed of transformers' slow
processor, of the ratios turn by turn. An archive is a tar written by webdataset with a JPEG (4:2:0,
mean size below) and a small JSON each; pictures are synthetic (photo-like noise, pages, charts),
1024x768 ones about as large as photos on the web. Tiles as AMALIA-VL has them (384 px, at most 12
and the base), in the column "3x3" with canvases of 1 to 3 tiles a side. At 1024x768 the canvas is
the picture itself, so nothing is resized for it; at 1280x960 it is.

*ours*: index, pread, CRC-32, decoding and tiling into a uint8 array that is there already, what a
rank hands to its GPU, which normalises; the archive is indexed in place. *transformers*: the bytes
read as ours are, Pillow, `LlavaNextImageProcessor` (float32, its only output). *webdataset* and
*energon*: their reader in this process (energon's crude data set and a cooker, no shuffling),
Pillow's decoder and resize with as few copies as NumPy allows, normalised to float32 as it is for
transformers' models; the rows "uint8" leave that out. *JPEG decoding alone*: libjpeg-turbo's exact
decoding (simplejpeg), of bytes in memory, into an array that is there already: what no exact path
can beat.

glibc's allocator is as it comes. It gives large arrays back to the system and takes them anew page
by page, or keeps them, by what was freed before; with Pillow and NumPy that is up to a fifth of the
time, so a "uint8" row can come out above the float row beside it.
"""


def image_sets(work: Path, scale: float) -> list[ImageSet]:
    """The pictures of the table; `scale` 1: 32 small ones, 16 large ones."""
    amalia = AnyresGeometry.from_model(compose(["model=amalia_vl_9b", "data=demo"]).model)
    nine = AnyresGeometry(amalia.tile, amalia.patch, NINE)
    plan = [
        (SMALL, 768, 1024, amalia, 32),
        ("1280x960", 960, 1280, amalia, 24),
        (LARGE, 1536, 2048, amalia, 16),
        (LARGE_NINE, 1536, 2048, nine, 16),
        ("1200x2048", 2048, 1200, amalia, 16),
        ("768x2400", 2400, 768, amalia, 16),
    ]
    return [
        ImageSet(name, height, width, geometry, work / "images" / f"set{n}", _count(count, scale))
        for n, (name, height, width, geometry, count) in enumerate(plan)
    ]


def check_equal(sets: Sequence[ImageSet], say: Callable[[str], None]) -> dict[str, float]:
    """Our tiles of every picture, normalised by the model's table, against transformers'.

    Returns each set's `sides.checksum`.

    Raises:
        ValueError: a value differs; names the picture.
    """
    from data_shards.images import write_tiles_from
    from data_shards.manifest import read_manifest
    from data_shards.reader import DescriptorCache, ShardReader
    from models.vision_tower import pixel_table

    table, found = pixel_table().numpy(), {}
    for image_set in sets:
        manifest = read_manifest(image_set.folder / "manifest.parquet")
        reader, total = ShardReader(manifest, DescriptorCache()), 0
        processor = sides.processor_of(image_set.geometry)
        out_NCHW = sides.new_array(image_set)
        for row in range(len(manifest)):
            data = reader.read(row)[1][0]
            write_tiles_from(data, image_set.height, image_set.width, image_set.geometry, out_NCHW)
            theirs = processor(sides.opened(data), return_tensors="np")["pixel_values"][0]
            difference = float(np.abs(table[out_NCHW] - theirs).max())
            if theirs.shape != out_NCHW.shape or difference:
                raise ValueError(
                    f"{image_set.archive}: picture {row} differs from transformers' by "
                    f"{difference}; nothing is timed"
                )
            total += sides.crc_of(out_NCHW)
        found[image_set.name] = float(total)
        say(f"{image_set.name}: equal to transformers")
    return found


def all_sides(sets: Sequence[ImageSet], energon: bool) -> list[Side]:
    """Quick ones make several passes a turn."""
    shared = {"sets": list(sets)}
    found = [
        Side(SLOW, sides.with_transformers, {**shared, "repeats": 1}),
        Side(WEBDATASET, sides.with_webdataset, {**shared, "repeats": 1, "normalise": True}),
        Side(WEBDATASET_U8, sides.with_webdataset, {**shared, "repeats": 1, "normalise": False}),
    ]
    if has_torchvision():
        fast = {**shared, "repeats": 1, "fast": True}
        found.insert(1, Side(FAST, sides.with_transformers, fast))
    if energon:
        found += [
            Side(ENERGON, sides.with_energon, {**shared, "repeats": 1, "normalise": True}),
            Side(ENERGON_U8, sides.with_energon, {**shared, "repeats": 1, "normalise": False}),
        ]
    return [
        *found,
        Side(FALLBACK, sides.ours, {**shared, "repeats": 1, "backend": "pillow"}),
        Side(OURS, sides.ours, {**shared, "repeats": 4}),
        Side(FLOOR, sides.decode_only, {**shared, "repeats": 4}),
    ]


def has_torchvision() -> bool:
    """Whether transformers' fast processor can run."""
    return importlib.util.find_spec("torchvision") is not None


def by_set(taken: Turns, sets: Sequence[ImageSet]) -> dict[str, Turns]:
    """The turns of each set: a turn is one set, the sets one after another."""
    return {
        one.name: Turns(
            {side: reports[n :: len(sets)] for side, reports in taken.reports.items()},
            taken.others,
        )
        for n, one in enumerate(sets)
    }


def check_sums(turns: Mapping[str, Turns], expected: Mapping[str, float]) -> None:
    """ValueError unless all sides that make uint8 tiles made the same as those compared."""
    for name, taken in turns.items():
        for side in UINT8 & taken.reports.keys():
            if any(report["checksum"] != expected[name] for report in taken.reports[side]):
                raise ValueError(f"{side} makes other tiles of the {name} pictures than ours")


def rows_of(turns: Mapping[str, Turns]) -> list[list[Any]]:
    """One row a side: milliseconds and times transformers' speed, for each set."""
    first = next(iter(turns.values()))
    return [[side, *(_cell(taken, side) for taken in turns.values())] for side in first.reports]


def verdicts(turns: Mapping[str, Turns]) -> list[str]:
    """Each goal beside what was measured."""
    found = []
    for side, reference, name, goal in GOALS:
        taken = turns[name]
        what = f"{side}, {name}, against {reference}"
        aim = f"at least {goal:g} times" if goal >= 1 else f"at least {100 * goal:.0f} %"
        if reference not in taken.reports:
            found.append(f"{what}: goal {aim}, not measured: {NO_ENERGON}.")
            continue
        ratios = taken.ratios(side, reference, "pictures", "cpu")
        judged = "reached" if statistics.median(ratios) >= goal else "missed"
        if machine.disturbed(taken.others):
            judged = "not judged"
        found.append(f"{what}: goal {aim}, {judged}: {spread(ratios)}.")
    return found


def measure(work: Path, scale: float, turns: int, say: Callable[[str], None], **_: Any) -> Section:
    """The table "From an archive to tiles"."""
    sets = image_sets(work, scale)
    for number, image_set in enumerate(sets):
        write_set(image_set, number)
    say("pictures written")
    energon = prepare_energon(sets)
    sums = check_equal(sets, say)
    number = len(sets)
    taken = take_turns(all_sides(sets, energon), turns * number, warm_up=number, say=say)
    divided = by_set(taken, sets)
    check_sums(divided, sums)
    warning = machine.disturbed(taken.others)
    facts = machine.facts()
    facts["versions"] |= machine.versions_of(PACKAGES)
    if energon:
        facts["versions"]["megatron-energon"] = sides.energon_version()
    pictures = sum(image_set.count for image_set in sets)
    sizes = {s.name: s.archive.stat().st_size / s.count / 1e3 for s in sets}
    return Section(
        title="From an archive to tiles",
        method=METHOD,
        columns=["CPU ms a picture (times transformers' speed)", *(s.name for s in sets)],
        rows=[
            ["tiles", *(s.n_tiles for s in sets)],
            ["KB in the archive", *(round(size) for size in sizes.values())],
            *rows_of(divided),
        ],
        facts=facts,
        notes=[
            *([warning] if warning else []),
            f"Zero difference: the tiles of all {pictures} pictures, normalised by the model's "
            "table, are bit for bit transformers' `pixel_values`, in this run; the Pillow and "
            "uint8 rows made the same tiles.",
            *verdicts(divided),
            *(
                []
                if has_torchvision()
                else [f"{FAST}: not measured, torchvision is not installed."]
            ),
        ],
        settings={"turns": turns, "pictures": pictures, "instructions": _backend()},
        data={
            "milliseconds": {
                name: {
                    side: [1e3 * r["cpu"] / r["pictures"] for r in reports]
                    for side, reports in one.reports.items()
                }
                for name, one in divided.items()
            },
            "others": taken.others,
        },
    )


def _cell(taken: Turns, side: str) -> str:
    milliseconds = statistics.median(1e3 * r["cpu"] / r["pictures"] for r in taken.reports[side])
    ratio = statistics.median(taken.ratios(side, SLOW, "pictures", "cpu"))
    return (
        f"{milliseconds:.3g} ({ratio:.2g})" if ratio < 10 else f"{milliseconds:.3g} ({ratio:.1f})"
    )


def _backend() -> str:
    from data_shards.images import backend

    return str(backend())


def _count(count: int, scale: float) -> int:
    return max(2, round(count * scale))
