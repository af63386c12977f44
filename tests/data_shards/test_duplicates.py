"""What counts as seen before: against plain loops over every pair, and on pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from conf.schema.data import DuplicatesConfig
from data_shards.duplicates import MIN_DETAIL, find_duplicates
from data_shards.fingerprint_arrays import NamedFingerprints
from data_shards.fingerprints import SCHEMA
from data_shards.near_hashes import as_words, near_matches, near_pairs


def flipped(value: bytes, bits: Sequence[int]) -> bytes:
    number = int.from_bytes(value)
    for bit in bits:
        number ^= 1 << int(bit)
    return number.to_bytes(len(value))


def some_hashes(generator: np.random.Generator, count: int, reach: int) -> list[bytes]:
    """A few families: each hash is up to `reach` bits from the head of its family."""
    heads = [generator.bytes(32) for _ in range(count // 6 + 1)]
    return [
        flipped(
            heads[generator.integers(len(heads))],
            generator.choice(256, generator.integers(reach + 1), replace=False),
        )
        for _ in range(count)
    ]


def distance(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


@pytest.mark.parametrize("bits", range(8))
def test_near_pairs_are_those_of_every_pair(bits: int) -> None:
    generator = np.random.default_rng(bits)
    hashes = some_hashes(generator, 150, 6)
    context = generator.integers(0, 2, len(hashes)).astype(np.uint64)
    expected = [
        (a, b)
        for b in range(len(hashes))
        for a in range(b)
        if distance(hashes[a], hashes[b]) <= bits and context[a] == context[b]
    ]
    one, other = near_pairs(as_words(b"".join(hashes)), context, bits)
    assert list(zip(one.tolist(), other.tolist(), strict=True)) == expected
    assert expected


@pytest.mark.parametrize("bits", [0, 3, 6, 7])
def test_near_matches_are_the_first_of_all(bits: int) -> None:
    hashes = some_hashes(np.random.default_rng(bits), 120, 5)
    known, asked = hashes[:40], hashes[40:]
    expected = [
        next((k for k, value in enumerate(known) if distance(value, one) <= bits), -1)
        for one in asked
    ]
    found = near_matches(as_words(b"".join(known)), as_words(b"".join(asked)), bits)
    assert found.tolist() == expected
    assert max(expected) >= 0 > min(expected)


def test_a_crowd_does_not_cost_its_square() -> None:
    """A thousand pictures about one: half a million pairs, of which the first few are enough."""
    generator = np.random.default_rng(0)
    head = generator.bytes(32)
    crowd = [head] + [flipped(head, generator.choice(256, 3)) for _ in range(1000)]
    one, other = near_pairs(as_words(b"".join(crowd)), np.zeros(len(crowd), np.uint64), 6)
    assert len(one) < len(crowd) * 250
    assert set(other[one == 0]) == set(range(1, len(crowd)))
    codes = one * len(crowd) + other
    assert len(np.unique(codes)) == len(codes) and (one < other).all()


@dataclass(frozen=True)
class Picture:
    sha256: bytes
    pixels: bytes | None
    hash: bytes

    def alike(self, other: "Picture", bits: int | None) -> bool:
        if self.pixels is None and other.pixels is None:
            same = self.sha256 == other.sha256
        else:
            same = self.pixels is not None and self.pixels == other.pixels
        ones = [int.from_bytes(picture.hash).bit_count() for picture in (self, other)]
        detail = MIN_DETAIL <= min(ones) and max(ones) <= 256 - MIN_DETAIL
        return same or (bits is not None and detail and distance(self.hash, other.hash) <= bits)


@dataclass(frozen=True)
class Row:
    text: bytes
    images: tuple[Picture, ...] = ()

    def alike(self, other: "Row", bits: int | None) -> bool:
        return len(self.images) == len(other.images) and all(
            a.alike(b, bits) for a, b in zip(self.images, other.images, strict=True)
        )


def prints(name: str, rows: Sequence[Row], first: int = 0) -> NamedFingerprints:
    records = [
        {"number": first + n, "text": row.text, "images": [vars(image) for image in row.images]}
        for n, row in enumerate(rows)
    ]
    # In several pieces, as a folder of blocks gives them.
    pieces = [records[start : start + 7] for start in range(0, len(records), 7)]
    tables = [pa.Table.from_pylist(piece, schema=SCHEMA) for piece in pieces]
    return NamedFingerprints(name, pa.concat_tables([SCHEMA.empty_table(), *tables]))


def by_hand(
    sources: dict[str, list[Row]],
    tests: list[Row],
    rules: DuplicatesConfig,
    unique: Sequence[str],
) -> dict[str, set[int]]:
    """Rule after rule, every sample against every one that stays before it."""
    bits = rules.near_bits
    everything = [(name, n, row) for name, rows in sources.items() for n, row in enumerate(rows)]

    def seen(row: Row) -> bool:
        if not row.images:
            return any(row.text == test.text for test in tests)
        return any(a.alike(b, bits) for a in row.images for test in tests for b in test.images)

    everything = [sample for sample in everything if not seen(sample[2])]

    def pass_over(first_rule: bool, bits: int | None) -> None:
        staying: list[tuple[str, int, Row]] = []
        for name, number, row in everything:
            wanted = first_rule or (name in unique and bool(row.images))
            if not wanted or not any(
                row.alike(other, bits)
                and (not first_rule or row.text == other.text)
                and (first_rule or bool(other.images))
                and (rules.across_sources or name == other_name)
                for other_name, _, other in staying
            ):
                staying.append((name, number, row))
        everything[:] = staying

    if rules.exact:
        pass_over(True, None)
        pass_over(True, bits)
    pass_over(False, bits)
    kept = {(name, number) for name, number, _ in everything}
    return {
        name: {n for n in range(len(rows)) if (name, n) not in kept}
        for name, rows in sources.items()
    }


def random_rows(generator: np.random.Generator, count: int, hashes: Sequence[bytes]) -> list[Row]:
    def picture() -> Picture:
        which = int(generator.integers(len(hashes)))
        content = bytes([which, int(generator.integers(3))])
        pixels = bytes(reversed(content)) * 7 + b"px" if generator.integers(2) else None
        return Picture(content * 16, pixels, hashes[which])

    return [
        Row(
            bytes([int(generator.integers(3))]) * 16,
            tuple(picture() for _ in range(generator.choice(4, p=[0.1, 0.6, 0.2, 0.1]))),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_what_is_dropped_is_what_plain_loops_drop(seed: int) -> None:
    generator = np.random.default_rng(seed)
    hashes = some_hashes(generator, 40, 5) + [bytes(32), flipped(bytes(32), [3]), b"\xff" * 32]
    sources = {name: random_rows(generator, 40, hashes) for name in ("a", "b", "c")}
    tests = random_rows(generator, 2, hashes) if seed % 2 else []
    rules = DuplicatesConfig(
        exact=seed % 5 != 4,
        near_bits=(None, 0, 4, 6, 7)[seed % 5],
        across_sources=seed % 3 != 2,
    )
    unique = ("b", "c") if seed % 4 else ()
    found = find_duplicates(
        [prints(name, rows) for name, rows in sources.items()],
        [prints("tests", tests)],
        rules,
        dict.fromkeys(unique, True),
    )
    assert {name: set(reasons) for name, reasons in found.items()} == by_hand(
        sources, tests, rules, unique
    )
