"""The folder of a data set while its shards are written, and how it comes to stand under its name.

    ROOT/NAME/            complete, or absent: manifest.parquet, index/, shards/, quarantine/,
                          hits.json, card.html, card.parquet
    ROOT/.NAME.building/  the same files growing, and work/:
        work/inputs                     digest of all that decides the data set
        work/duplicates.parquet         which rows are left out (number, reason)
        work/rejected.json              numbers of the bad rows that are kept to look at
        work/parts/BBBBB-NNNN.parquet   manifest rows of one finished shard of a block; the block's
                                        last one is BBBBB-NNNN.last.parquet
        work/parts/BBBBB.rejected.tar   bad samples themselves, up to a limit
    ROOT/.NAME.old/       for the instant of the exchange

A shard counts as finished when its part is there. Shards are NAME-BBBBB-NNNN.tar: block, number in
the block. So the files do not depend on who wrote which block, or when.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.durable import replacing, sync_directory
from data_shards.examined import writer
from data_shards.manifest import FILE_NAME, SCHEMA
from data_shards.stamped_folder import StampedFolder
from data_shards.writer import ShardInfo

WORK = "work"
_LAST = ".last"
_PART_KEY = b"amalia_vl_part"
_DUPLICATES = pa.schema([("number", pa.int64()), ("reason", pa.string())])


@dataclass(frozen=True)
class Part:
    """What is known about one finished shard of a block."""

    shard: ShardInfo | None  # None: no sample was left
    next_number: int  # the first row that it has not looked at
    last: bool  # nothing of the block is left
    rows: pa.Table  # of the manifest's schema; `shard` counts within the block


class DatasetFolder:
    """Paths and transitions of one data set."""

    def __init__(self, root: Path, name: str):
        self.final = root / name
        self.building = root / f".{name}.building"
        self.shards = self.building / "shards"
        self._work = self.building / WORK
        self._parts = self._work / "parts"
        self._old = root / f".{name}.old"
        self._name = name

    @property
    def manifest(self) -> Path:
        """The finished data set's manifest."""
        return self.final / FILE_NAME

    def stamped(self) -> StampedFolder:
        return StampedFolder(self.building, WORK)

    def make(self) -> None:
        """The folders that shards and parts go to."""
        for folder in (self.shards, self._parts):
            folder.mkdir(parents=True, exist_ok=True)

    def shard_path(self, block: int, number: int) -> Path:
        """Where shard `number` of a block is written."""
        return self.shards / f"{self._name}-{block:05d}-{number:04d}.tar"

    def rejected_path(self, block: int) -> Path:
        """Where the bad samples of a block go that are kept."""
        return self._parts / f"{block:05d}.rejected.tar"

    def write_part(self, block: int, number: int, part: Part) -> None:
        """Record a finished shard."""
        facts = {
            "shard": asdict(part.shard) if part.shard else None,
            "next_number": part.next_number,
            "last": part.last,
        }
        metadata = {_PART_KEY: json.dumps(facts).encode()}
        with replacing(self._part_path(block, number, part.last), writer()) as file:
            pq.write_table(part.rows.replace_schema_metadata(metadata), file, compression="zstd")

    def parts(self, block: int) -> Iterator[Part]:
        """Finished shards of a block, in order, up to the first that is not there in full."""
        number = 0
        while (part := self._read_part(block, number)) is not None:
            yield part
            if part.last:
                return
            number += 1

    def done(self) -> set[int]:
        """Blocks that have their last part."""
        try:
            names = os.listdir(self._parts)
        except FileNotFoundError:
            return set()
        return {int(name.split("-")[0]) for name in names if name.endswith(f"{_LAST}.parquet")}

    def forget_damaged(self, blocks: Iterable[int]) -> None:
        """Make blocks undone whose shards are not all there in full."""
        for block in blocks:
            if not any(part.last for part in self.parts(block)):
                for path in self._parts.glob(f"{block:05d}-*{_LAST}.parquet"):
                    path.unlink()

    def drop_unlisted(self, listed: set[str]) -> None:
        """Remove shards of a build that was cut short before it recorded them."""
        for path in self.shards.iterdir():
            if path.name not in listed:
                path.unlink()

    def write_left_out(self, reasons: dict[int, str], rejected: list[int]) -> None:
        """Record which rows are duplicates, and why, and which bad ones are kept to look at."""
        with replacing(self._rejected, writer()) as file:
            file.write(json.dumps(rejected).encode())
        numbers = sorted(reasons)
        table = pa.table([numbers, [reasons[n] for n in numbers]], schema=_DUPLICATES)
        with replacing(self._duplicates, writer()) as file:
            # Small groups in order of the number: a block reads only its own.
            pq.write_table(table, file, compression="zstd", row_group_size=1 << 16)

    def has_left_out(self) -> bool:
        """Whether the search for duplicates is done."""
        return self._duplicates.exists()

    def rejected(self) -> set[int]:
        """Numbers of the bad rows that shall be kept."""
        return set(json.loads(self._rejected.read_bytes()))

    def duplicates(self, first: int, stop: int) -> dict[int, str]:
        """Reasons of the rows `first` to `stop` that are left out."""
        wanted = [("number", ">=", first), ("number", "<", stop)]
        table = pq.read_table(self._duplicates, filters=wanted)
        return dict(zip(table["number"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def publish(self) -> None:
        """Make the building folder the data set, in place of an older one."""
        if self.final.exists():
            os.rename(self.final, self._old)
        os.rename(self.building, self.final)
        sync_directory(self.final.parent)
        self._tidy()

    def repair(self) -> None:
        """Finish an exchange that was interrupted."""
        if self._old.exists() and not self.final.exists():
            # Between the two renames of `publish`: the new data set is complete.
            os.rename(self.building, self.final)
            sync_directory(self.final.parent)
        self._tidy()

    def _tidy(self) -> None:
        """Drop what only the build needed."""
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self.final / WORK, ignore_errors=True)

    @property
    def _rejected(self) -> Path:
        return self._work / "rejected.json"

    @property
    def _duplicates(self) -> Path:
        return self._work / "duplicates.parquet"

    def _part_path(self, block: int, number: int, last: bool) -> Path:
        return self._parts / f"{block:05d}-{number:04d}{_LAST if last else ''}.parquet"

    def _read_part(self, block: int, number: int) -> Part | None:
        """A part whose shard is there in full, else None: it is built again."""
        for last in (True, False):
            try:
                table = pq.read_table(self._part_path(block, number, last))
                facts = json.loads(table.schema.metadata[_PART_KEY])
                shard = ShardInfo(**facts["shard"]) if facts["shard"] else None
                if shard and self.shard_path(block, number).stat().st_size != shard.size:
                    continue
                rows = table.replace_schema_metadata(None).cast(SCHEMA)
                return Part(shard, int(facts["next_number"]), last, rows)
            except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
                continue
        return None
