"""Fingerprints of many samples as NumPy arrays, and which of them are equal."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))


@dataclass(frozen=True)
class NamedFingerprints:
    """The fingerprints of one data set: a table of `fingerprints.SCHEMA`."""

    name: str
    table: pa.Table


@dataclass(frozen=True)
class Samples:
    """Samples of several data sets, one after the other.

    Attributes:
        names: of the data sets; `source` int16 [N] indexes them.
        number: int64 [N], row in the data set.
        text, image: uint64 [N, 2] and [I, 2], equal where texts and images are the same.
        first_image: int64 [N + 1]; sample n has images first_image[n] to first_image[n + 1] - 1.
        hash: uint64 [I, 4].
    """

    names: tuple[str, ...]
    source: np.ndarray
    number: np.ndarray
    text: np.ndarray
    first_image: np.ndarray
    image: np.ndarray
    hash: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[NamedFingerprints]) -> "Samples":
        """Take the columns out of the tables."""
        parts = [_columns(part.table) for part in sets]
        counts = [len(part[0]) for part in parts]
        number, text, lengths, image, hashes = (
            np.concatenate([np.empty((0, *shape), kind), *(part[column] for part in parts)])
            for column, (kind, shape) in enumerate(
                [
                    (np.int64, ()),
                    (np.uint64, (2,)),
                    (np.int64, ()),
                    (np.uint64, (2,)),
                    (np.uint64, (4,)),
                ]
            )
        )
        first_image = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(np.arange(len(sets), dtype=np.int16), counts)
        names = tuple(part.name for part in sets)
        return cls(names, source, number, text, first_image, image, hashes)

    @property
    def count(self) -> int:
        """Samples."""
        return len(self.number)

    @property
    def n_images(self) -> np.ndarray:
        """int64 [N]."""
        return np.diff(self.first_image)

    def place(self, row: int) -> tuple[str, int]:
        """(data set, row number) of a sample."""
        return self.names[self.source[row]], int(self.number[row])

    def sample_of_image(self) -> np.ndarray:
        """int64 [I]."""
        return np.repeat(np.arange(self.count), self.n_images)

    def keys(self, scope: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """uint64 [N, 2], equal where `scope` (uint64 [N, 2]) is and the `tokens` (uint64 [I, 2])
        of all images are, in order; otherwise by a chance of 2^-128."""
        position = np.arange(len(self.image)) - np.repeat(self.first_image[:-1], self.n_images)
        total = np.zeros((len(tokens) + 1, 2), np.uint64)
        np.cumsum(mixed(tokens, position), axis=0, out=total[1:])  # modulo 2^64, as differences
        images = total[self.first_image[1:]] - total[self.first_image[:-1]]
        return mixed(scope, self.n_images) + images


def mixed(words_N2: np.ndarray, numbers_N: np.ndarray) -> np.ndarray:
    """Words that depend on the number too, and so well mixed that they may be added up
    (the finaliser of SplitMix64)."""
    mixed = words_N2 + (numbers_N.astype(np.uint64)[:, None] + np.uint64(1)) * np.array(_ODD)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def folded(hashes_IW: np.ndarray) -> np.ndarray:
    """uint64 [I, 2] that are equal where hashes are; otherwise by a chance of about 2^-128."""
    folded = np.zeros((len(hashes_IW), 2), np.uint64)
    for word in range(hashes_IW.shape[1]):
        folded = mixed(folded + hashes_IW[:, word, None], np.full(len(hashes_IW), word))
    return folded


def lookup(known_K2: np.ndarray, wanted_N2: np.ndarray) -> np.ndarray:
    """int64 [N]: index of an equal known pair of words, or -1."""
    if not len(known_K2):
        return np.full(len(wanted_N2), -1, np.int64)
    order = np.argsort(known_K2[:, 0], kind="stable")
    place = np.searchsorted(known_K2[order, 0], wanted_N2[:, 0])
    found = order[np.minimum(place, len(order) - 1)]
    return np.where((known_K2[found] == wanted_N2).all(1), found, -1)


def repeated_rows(keys_N2: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose key an earlier one of `rows` has, the first of these); `rows` ascend."""
    keys = keys_N2[rows]
    order = np.argsort(keys[:, 0], kind="stable")
    keys = keys[order]
    same = (keys[1:] == keys[:-1]).all(1)
    # The first of a run of equal keys has the lowest row, because the sort is stable.
    start = np.maximum.accumulate(
        np.where(np.concatenate([[True], ~same]), np.arange(len(keys)), 0)
    )
    later = np.flatnonzero(same) + 1
    repeated, firsts = rows[order[later]], rows[order[start[later]]]
    order = np.argsort(repeated)
    return repeated[order], firsts[order]


def _columns(table: pa.Table) -> tuple[np.ndarray, ...]:
    """(number, text, images of each sample, image, hash) as arrays."""
    table = table.combine_chunks()
    lists = _chunk(table["images"], table.schema.field("images").type)
    structs = lists.flatten()
    sha256, pixels, hashes = (structs.field(n) for n in ("sha256", "pixels", "hash"))
    image = _fixed(sha256)[:, :2].copy()
    known = pixels.is_valid().to_numpy(zero_copy_only=False)
    image[known] = _fixed(pixels)[known]
    lengths = np.asarray(lists.value_lengths(), np.int64)
    text = _fixed(_chunk(table["text"], pa.binary(16)))
    return np.asarray(table["number"], np.int64), text, lengths, image, _fixed(hashes)


def _chunk(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], kind)


def _fixed(values: pa.Array) -> np.ndarray:
    """Binary values of fixed width as uint64 [n, width / 8]; whatever where they are null."""
    width = values.type.byte_width
    if not len(values):
        return np.empty((0, width // 8), np.uint64)
    content = np.frombuffer(values.buffers()[1], np.uint8)
    start = values.offset * width
    return content[start : start + len(values) * width].view("<u8").reshape(-1, width // 8)
