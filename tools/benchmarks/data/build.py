"""From a source to shards: our builder with all its checks, beside others that do less."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.benchmarks import machine
from tools.benchmarks.data import build_sides
from tools.benchmarks.data.build_sides import FineVision, prepare
from tools.benchmarks.table import Section
from tools.benchmarks.turns import Side, Turns, spread, take_turns

OURS, PILLOW = "ours, all checks", "the same with Pillow: every image decoded in full"
TAR = "webdataset TarWriter, no checks"
DECODED = "full decode (libjpeg-turbo) and TarWriter"
REENCODED = "full decode, JPEG again (quality 95) and TarWriter"
GOALS = {PILLOW: 2.0}  # ours against these
PACKAGES = ("pillow", "simplejpeg", "webdataset", "pyarrow", "tokenizers")
METHOD = """
CPU time of one process (all its threads, the system's part included), from one Parquet file in the
page cache to tar shards; each side in a process of its own, in turn, medians over the turns. The
file is as FineVision's are (`images`: struct of bytes and path, `texts`: user and assistant, one to
three turns, two thirds of the rows in English, the others in Portuguese, 1,000 characters a row)
with one picture a row: JPEG 4:2:0, most 1024x768 of about 120 KB, every twelfth 2048x1536, every
tenth with EXIF metadata; synthetic (photo-like noise, pages, charts).

*Ours* is `data_shards.build` with one worker, all four phases: layout and chat checks, tokenising,
every entropy-coded bit of every image read (a strict DCT-scaled decoding), metadata taken out,
SHA-256 and CRC-32 of each member, hashes and the search for exact and near duplicates, variety and
language, the source read a second time and compared, shards, manifest, index, quarantine and card.
*The same with Pillow* decodes each image in full with Pillow in place of the strict scaled
decoding, and computes the hash from that; all else is the same program. *TarWriter* copies the
bytes and a JSON member, unseen. *Full decode* is what img2dataset does with each image that it has
downloaded: decode (there OpenCV, here libjpeg-turbo through simplejpeg, no slower), look at the
size, SHA-256, TarWriter with a JSON member; img2dataset's default also encodes the image again with
quality 95, which changes its pixels. None of these finds duplicates, counts tokens or can resume.
"""


def all_sides(source: FineVision) -> list[Side]:
    """In the order of their turns; quick ones go through the file several times a turn."""
    shared: Mapping[str, Any] = {"source": source}
    return [
        Side(PILLOW, build_sides.ours, {**shared, "pillow": True}),
        Side(OURS, build_sides.ours, {**shared, "pillow": False}),
        Side(REENCODED, build_sides.decoded, {**shared, "again": True}),
        Side(DECODED, build_sides.decoded, {**shared, "again": False}),
        Side(TAR, build_sides.tar_writer, {**shared, "repeats": 8}),
    ]


def rows_of(taken: Turns) -> list[list[str | float | int | None]]:
    """Samples and megabytes a second of one core, and our speed over each side's."""
    rows: list[list[str | float | int | None]] = []
    for side in (TAR, DECODED, REENCODED, PILLOW, OURS):
        rates = taken.rates(side, "samples", "cpu_seconds")
        sizes = taken.rates(side, "megabytes", "cpu_seconds")
        ratio = taken.ratios(OURS, side, "samples", "cpu_seconds")
        rows.append(
            [
                side,
                statistics.median(rates),
                statistics.median(sizes),
                1e3 / statistics.median(rates),
                "" if side == OURS else spread(ratio),
            ]
        )
    return rows


def verdicts(taken: Turns) -> list[str]:
    """Each goal beside what was measured."""
    found = []
    for side, goal in GOALS.items():
        ratios = taken.ratios(OURS, side, "samples", "cpu_seconds")
        what = "reached" if statistics.median(ratios) >= goal else "missed"
        if machine.disturbed(taken.others):
            what = "not judged"
        found.append(f"Ours against {side}: goal {goal:g}, {spread(ratios)}, {what}.")
    return found


def check_same(taken: Turns) -> str:
    """Both builders wrote the same bytes in every turn.

    Raises:
        ValueError: they did not, so that different things would be compared.
    """
    sums = {r["shards_crc"] for side in (OURS, PILLOW) for r in taken.reports[side]}
    if len(sums) != 1:
        raise ValueError("the two builders do not write the same shards; nothing is compared")
    kept = int(taken.value(OURS, "kept"))
    return (
        f"Both builders wrote the same shards, byte for byte, in every turn: {kept} samples; of "
        f"{int(taken.value(OURS, 'samples'))} rows {int(taken.value(OURS, 'left_out'))} are "
        "duplicates or damaged, and were put in quarantine."
    )


def measure(work: Path, scale: float, turns: int, say: Callable[[str], None], **_: Any) -> Section:
    """The table "From a source to shards"."""
    source = prepare(work / "build", scale)
    say(f"{source.rows} rows written")
    taken = take_turns(all_sides(source), turns, say=say)
    same = check_same(taken)
    warning = machine.disturbed(taken.others)
    facts = machine.facts()
    facts["versions"] |= machine.versions_of(PACKAGES)
    return Section(
        title="From a source to shards",
        method=METHOD,
        columns=[
            "side",
            "samples/s of one core",
            "MB/s of one core",
            "CPU ms a sample",
            "ours is so many times as fast",
        ],
        rows=rows_of(taken),
        facts=facts,
        notes=[*([warning] if warning else []), *verdicts(taken), same],
        settings={"turns": turns, "rows": source.rows, "MB": round(source.bytes / 1e6)},
        data={"reports": taken.reports, "others": taken.others},
    )
