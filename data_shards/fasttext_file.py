"""Whether a file is a whole supervised fastText model, before the library, in C++, reads it.

Every length that the file states is followed to its end, which must be the end of the file. Format,
little-endian (github.com/facebookresearch/fastText, `saveModel` of version 12): magic and version;
12 settings and a double; the dictionary; the input matrix and the output matrix, each dense or
quantised.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC, VERSIONS = 793712314, (11, 12)
SUPERVISED = 3
_LOSSES = (1, 2, 3, 4)  # hierarchical softmax, negative sampling, softmax, one against all
MOST_BYTES = 8 << 30
_HEADER = struct.Struct("<2i12id")
_DICTIONARY = struct.Struct("<3i2q")  # entries, words, labels, tokens, pruned
_AFTER_WORD = 9  # bytes: count and type
_CENTROIDS = 256 * 4  # bytes for each dimension of a quantiser


class ModelError(ValueError):
    """A model that cannot be used; the message names the file, the cause and the remedy."""


def check_file(path: Path) -> None:
    """ModelError unless `path` is such a file from its first byte to its last."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if not _HEADER.size + _DICTIONARY.size < size <= MOST_BYTES:
                raise _Damaged(f"has {size:,} bytes, which no such model has")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(data, size).through()
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from None
    except _Damaged as error:
        raise _refusal(path, str(error)) from None


def _refusal(path: Path, cause: str) -> ModelError:
    return ModelError(
        f"{path} {cause}; set data.variety_model to a supervised fastText model (.bin or .ftz), or "
        "to null"
    )


class _Damaged(ValueError):
    pass


@dataclass
class _Walk:
    """A position in the file that only moves forward, and never past the end."""

    data: mmap.mmap
    size: int
    at: int = 0

    def through(self) -> None:
        magic, version, *settings, _ = self._take(_HEADER)
        if magic != MAGIC:
            raise _Damaged("is not a fastText model")
        if version not in VERSIONS:
            raise _Damaged(f"is of version {version}; the library reads {VERSIONS[1]}")
        dim, n_grams, loss, model, bucket, longest = (settings[n] for n in (0, 5, 6, 7, 8, 10))
        if model != SUPERVISED:
            raise _Damaged("holds word vectors, not a classifier")
        # Word n-grams and parts of words are looked up modulo the buckets.
        if loss not in _LOSSES or bucket < 0 or (bucket == 0 and (n_grams > 1 or longest > 0)):
            raise _Damaged("is damaged: its settings contradict each other")
        words, labels, pruned = self._dictionary()
        quantised = self._flag()
        inputs = self._matrix(quantised, "input")
        outputs = self._matrix(self._flag() and quantised, "output")
        rows = words + (bucket if pruned < 0 else pruned)
        if inputs != (rows, dim) or outputs != (labels, dim):
            raise _Damaged("is damaged: its matrices do not fit its settings")
        if self.at != self.size:
            raise _Damaged(f"is damaged: {self.size - self.at:,} bytes too many")

    def _dictionary(self) -> tuple[int, int, int]:
        """Passes it; returns words, labels, and n-grams kept in a pruned model (-1: not pruned)."""
        entries, words, labels, _, pruned = self._take(_DICTIONARY)
        if not 2 <= labels <= 4096 or words < 0 or entries != words + labels:
            raise _Damaged(f"is damaged: {entries} words, {labels} of them labels")
        for _ in range(entries):
            end = self.data.find(b"\0", self.at, min(self.at + 65536, self.size))
            if end < 0:
                raise _Damaged("is damaged: its dictionary has no end")
            self.at = end + 1
            self._skip(_AFTER_WORD)
        start = self.at
        self._skip(8 * max(pruned, 0))
        kept = np.frombuffer(self.data[start : self.at], "<i4").reshape(-1, 2)
        if len(kept) and not (0 <= kept[:, 1].min() and kept[:, 1].max() < pruned):
            raise _Damaged("is damaged: it keeps n-grams outside its matrix")
        return words, labels, pruned

    def _matrix(self, quantised: bool, what: str) -> tuple[int, int]:
        """Passes a matrix; returns rows and columns."""
        norms = quantised and self._flag()
        rows, columns = self._take(struct.Struct("<2q"))
        if rows < 0 or not 0 < columns <= 4096:
            raise _Damaged(f"is damaged: its {what} matrix has {rows} rows, {columns} columns")
        if not quantised:
            self._skip(rows * columns * 4)
            return rows, columns
        (codes,) = self._take(struct.Struct("<i"))
        self._skip(codes)
        if codes != rows * self._quantiser(columns):
            raise _Damaged(f"is damaged: its {what} matrix has {codes} codes for {rows} rows")
        if norms:
            self._skip(rows)
            self._quantiser(1)
        return rows, columns

    def _quantiser(self, columns: int) -> int:
        """Passes a product quantiser; returns the codes of a row."""
        dim, parts, part, last = self._take(struct.Struct("<4i"))
        if dim != columns or not (0 < parts <= dim and 0 < part <= dim and 0 < last <= part):
            raise _Damaged("is damaged: a quantiser does not fit its matrix")
        if (parts - 1) * part + last != dim:
            raise _Damaged("is damaged: the parts of a quantiser do not add up")
        self._skip(dim * _CENTROIDS)
        return int(parts)

    def _take(self, form: struct.Struct) -> tuple[int, ...]:
        start = self.at
        self._skip(form.size)
        return form.unpack_from(self.data, start)

    def _flag(self) -> bool:
        start = self.at
        self._skip(1)
        if self.data[start] > 1:
            raise _Damaged("is damaged: neither yes nor no where it should say which")
        return bool(self.data[start])

    def _skip(self, size: int) -> None:
        if size < 0 or self.at + size > self.size:
            raise _Damaged("is damaged: it ends before what it announces")
        self.at += size
