"""The manifest's Parquet rows of one shard, and whether the index says the same of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.manifest import SCHEMA, Manifest
from data_shards.manifest_index import batch_columns

_SUMS = {"first_image", "first_key_byte"}  # kept as running sums, given as lengths


@dataclass(frozen=True)
class StoredMember:
    """Where a member lies, and what its bytes must be."""

    what: str  # for messages: "JSON", "image 0"
    image: int | None  # number of the image; None for the record
    offset: int
    size: int
    crc32: int
    sha256: bytes
    height: int = 0  # pixels, of an image
    width: int = 0


class ShardRows:
    """Rows of shard `number`, in the order of their bytes; iterating gives manifest rows.

    Only this shard's part of the Parquet file is read: data sets of a hundred million samples are
    checked shard by shard, on many machines at once.

    Raises:
        ManifestError: the Parquet file cannot be read.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        self.manifest, self.number = manifest, number
        rows = np.flatnonzero(manifest.shard == number)
        self._first = int(rows[0]) if len(rows) else 0
        stop = int(rows[-1]) + 1 if len(rows) else 0
        self._table = manifest.read(SCHEMA.names, self._first, stop).combine_chunks()
        offsets = self._table["json_offset"].to_numpy()[rows - self._first]
        self._order = rows[np.argsort(offsets, kind="stable")]
        images = self._table["images"].combine_chunks()
        self._n_images = np.asarray(images.value_lengths())

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.tolist())

    def key(self, row: int) -> str:
        """The sample's key."""
        return str(self._table["key"][row - self._first].as_py())

    def n_images(self, row: int) -> int:
        """Images of the sample."""
        return int(self._n_images[row - self._first])

    def members(self, row: int) -> Iterator[StoredMember]:
        """The record, then the images."""
        # One at a time: as Python values, all rows of an archive of others could fill the memory.
        facts: dict[str, Any] = self._table.slice(row - self._first, 1).to_pylist()[0]
        yield StoredMember(
            "JSON",
            None,
            facts["json_offset"],
            facts["json_size"],
            facts["json_crc32"],
            facts["json_sha256"],
        )
        for number, image in enumerate(facts["images"]):
            place = {name: value for name, value in image.items() if name != "tiles"}
            yield StoredMember(f"image {number}", number, **place)

    def differences(self) -> list[str]:
        """Where the index, from which training reads, is not what the Parquet file says."""
        found = []
        stop = self._first + len(self._table)
        for batch in self._table.to_batches(max_chunksize=max(len(self._table), 1)):
            for name, values in batch_columns(batch).items():
                stored = getattr(self.manifest, name)
                if name in _SUMS:
                    stored = np.diff(stored[self._first : stop + 1])
                else:
                    stored = stored[self._part(name, stop)]
                if not np.array_equal(stored, values):
                    found.append(f"of its samples index/{name}.npy and manifest.parquet differ")
        return found

    def _part(self, name: str, stop: int) -> slice:
        """The part of an index column that belongs to these rows."""
        if name.startswith("image_"):
            ends = self.manifest.first_image
        elif name == "key_bytes":
            ends = self.manifest.first_key_byte
        else:
            return slice(self._first, stop)
        return slice(int(ends[self._first]), int(ends[stop]))
