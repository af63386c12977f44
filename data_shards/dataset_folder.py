"""The folder of a data set while it is built, and how it comes to stand under its name.

    ROOT/NAME/            complete, or absent: manifest.parquet, shards/, quarantine.jsonl
    ROOT/.NAME.building/  the same files growing, and parts/: the index of each finished shard
    ROOT/.NAME.old/       for the instant of the exchange

A build that was killed goes on after its last finished shard.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.durable import replacing, sync_directory
from data_shards.manifest import FILE_NAME, SCHEMA
from data_shards.writer import ShardInfo

QUARANTINE = "quarantine.jsonl"
_PART_KEY = b"amalia_vl_part"


@dataclass(frozen=True)
class Part:
    """What is known about one finished shard."""

    shard: ShardInfo | None  # None: only refused rows were left
    next_row: int  # where the next shard starts reading
    refused: list[dict[str, Any]]
    rows: pa.Table  # of the manifest's schema


class DatasetFolder:
    """Paths and transitions of one data set."""

    def __init__(self, root: Path, name: str):
        self.final = root / name
        self.building = root / f".{name}.building"
        self._old = root / f".{name}.old"
        self._lock = root / f".{name}.lock"
        self._name = name

    @property
    def manifest(self) -> Path:
        """The finished data set's manifest."""
        return self.final / FILE_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one build of this data set at a time; also repairs an interrupted exchange.

        Raises:
            ValueError: another process is building it.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.final} is being built by another process; wait for it to end"
                ) from None
            self._repair()
            yield

    def open_building(self, inputs_digest: str) -> list[Part]:
        """Prepare the building folder; returns the parts an interrupted build of the same inputs
        has finished. Anything else in it is removed."""
        stamp = self.building / "inputs"
        same = stamp.exists() and stamp.read_text() == inputs_digest
        if not same and self.building.exists():
            shutil.rmtree(self.building)
        for folder in (self.building / "shards", self.building / "parts"):
            folder.mkdir(parents=True, exist_ok=True)
        if not same:
            with replacing(stamp) as file:
                file.write(inputs_digest.encode())
        parts: list[Part] = []
        while (part := self._read_part(len(parts))) is not None:
            parts.append(part)
        kept = {part.shard.name for part in parts if part.shard}
        for path in (self.building / "shards").iterdir():
            if path.name not in kept:
                path.unlink()
        return parts

    def shard_path(self, number: int) -> Path:
        """Where shard `number` is written."""
        return self.building / "shards" / f"{self._name}-{number:06d}.tar"

    def write_part(self, number: int, part: Part) -> None:
        """Record a finished shard."""
        facts = {
            "shard": asdict(part.shard) if part.shard else None,
            "next_row": part.next_row,
            "refused": part.refused,
        }
        metadata = {_PART_KEY: json.dumps(facts).encode()}
        with replacing(self._part_path(number)) as file:
            pq.write_table(part.rows.replace_schema_metadata(metadata), file)

    def write_quarantine(self, refused: list[dict[str, Any]]) -> Path:
        """One JSON line for each refused row; returns its path in the building folder."""
        path = self.building / QUARANTINE
        with replacing(path) as file:
            for entry in refused:
                file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        return path

    def publish(self) -> None:
        """Make the building folder the data set, in place of an older one."""
        if self.final.exists():
            os.rename(self.final, self._old)
        os.rename(self.building, self.final)
        sync_directory(self.final.parent)
        self._tidy()

    def _repair(self) -> None:
        """Finish an exchange that was interrupted."""
        if self._old.exists() and not self.final.exists():
            # Between the two renames of `publish`: the new data set is complete.
            os.rename(self.building, self.final)
            sync_directory(self.final.parent)
        self._tidy()

    def _tidy(self) -> None:
        """Drop what only the build needed."""
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self.final / "parts", ignore_errors=True)
        (self.final / "inputs").unlink(missing_ok=True)

    def _part_path(self, number: int) -> Path:
        return self.building / "parts" / f"{number:06d}.parquet"

    def _read_part(self, number: int) -> Part | None:
        """A part whose shard is there in full, else None: it is built again."""
        path = self._part_path(number)
        try:
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[_PART_KEY])
            shard = ShardInfo(**facts["shard"]) if facts["shard"] else None
            if shard and self.shard_path(number).stat().st_size != shard.size:
                return None
            rows = table.replace_schema_metadata(None).cast(SCHEMA)
            return Part(shard, int(facts["next_row"]), facts["refused"], rows)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
            return None
