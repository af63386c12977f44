"""What the examination of a source has found, block by block, until and after it is built.

    ROOT/.NAME.examined/
      inputs                 digest of what was examined, and how
      blocks.json            the blocks of the source: files and rows of each
      BBBBB.parquet          a row per good sample (SCHEMA); written last: the block is done
      BBBBB.fingerprints.parquet   what the search for duplicates compares
      BBBBB.refused.jsonl    origin, key and reason of each bad sample
      locks/BBBBB            held while a process works on the block, in either phase

The folder stays when the data set is built, about half a kilobyte a sample: later sources are
compared with it. It may be removed; it is then made again when something needs it.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards import fingerprints, manifest_facts
from data_shards.durable import replacing
from data_shards.locks import FileLock
from data_shards.prepare import Examined, Refused
from data_shards.sources.blocks import Block, Piece
from data_shards.stamped_folder import StampedFolder

_IMAGE = pa.struct(
    [
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("tiles", pa.int32()),
        ("extension", pa.string()),
    ]
)
# They stand in the manifest as they were examined.
MANIFEST_COLUMNS = (
    "tokens", "target_tokens", "tokens_rejected", "target_tokens_rejected", "tiles", "variety",
    "language", "source", "licence",
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("origin", pa.string()),
        ("json_size", pa.int64()),
        ("json_sha256", pa.binary(32)),
        ("images", pa.list_(_IMAGE)),
        *(manifest_facts.SCHEMA.field(name) for name in MANIFEST_COLUMNS),
    ]
)
_HITS = b"amalia_vl_hits"
_BLOCKS = "blocks.json"
_FINGERPRINTS, _REFUSED = "fingerprints.parquet", "refused.jsonl"


class BlockResult:
    """Grows while one block is examined; rows become Arrow every few hundred."""

    _GROUP = 512

    def __init__(self) -> None:
        self.refused: list[Refused] = []
        self.hits: Counter[str] = Counter()
        self._rows: list[dict[str, Any]] = []
        self._prints: list[dict[str, Any]] = []
        self._tables: tuple[list[pa.Table], list[pa.Table]] = ([], [])

    def add(self, result: Examined | Refused) -> None:
        """The next row of the block."""
        if isinstance(result, Refused):
            self.refused.append(result)
            return
        self._rows.append(result.row)
        self._prints.append({**result.fingerprint, "number": result.number})
        self.hits.update(result.hits)
        if len(self._rows) >= self._GROUP:
            self._flush()

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """(examined rows, fingerprints)."""
        self._flush()
        return pa.concat_tables(self._tables[0]), pa.concat_tables(self._tables[1])

    def _flush(self) -> None:
        self._tables[0].append(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._tables[1].append(pa.Table.from_pylist(self._prints, schema=fingerprints.SCHEMA))
        self._rows, self._prints = [], []


@dataclass(frozen=True)
class ExaminedFolder:
    """The folder of one source, or of one evaluation set."""

    path: Path

    @classmethod
    def of_source(cls, root: Path, name: str) -> "ExaminedFolder":
        return cls(root / f".{name}.examined")

    @classmethod
    def of_evaluation(cls, root: Path, name: str) -> "ExaminedFolder":
        return cls(root / f".evaluation.{name}.examined")  # no source's name has a dot

    def stamped(self) -> StampedFolder:
        return StampedFolder(self.path)

    def lock(self, block: int) -> FileLock:
        """Of one block; not taken yet."""
        return FileLock(self.path / "locks" / f"{block:05d}")

    def write_blocks(self, blocks: Sequence[Block]) -> None:
        """Record how the source is cut, so that nobody has to look through its files again."""
        plain = [asdict(block) for block in blocks]
        with replacing(self.path / _BLOCKS, writer()) as file:
            file.write(json.dumps(plain, default=str).encode())

    def read_blocks(self) -> list[Block] | None:
        """The blocks; None where they are not recorded yet."""
        try:
            plain = json.loads((self.path / _BLOCKS).read_bytes())
        except FileNotFoundError:
            return None
        return [
            Block(
                block["number"],
                block["first_number"],
                tuple(Piece(**{**piece, "file": Path(piece["file"])}) for piece in block["pieces"]),
            )
            for block in plain
        ]

    def done(self) -> set[int]:
        """Numbers of the blocks that are examined."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
        return {int(stem) for stem in stems if stem.isdigit()}

    def is_complete(self) -> bool:
        """Whether every block is examined."""
        blocks = self.read_blocks()
        return blocks is not None and self.done() >= {block.number for block in blocks}

    def write(self, block: int, result: BlockResult) -> None:
        """Record one block."""
        rows, prints = result.tables()
        mine = writer()
        with replacing(self._part(block, _FINGERPRINTS), mine) as file:
            pq.write_table(prints, file, compression="zstd")
        with replacing(self._part(block, _REFUSED), mine) as file:
            for refused in result.refused:
                file.write(json_line(asdict(refused)))
        metadata = {_HITS: json.dumps(dict(sorted(result.hits.items()))).encode()}
        with replacing(self._part(block, "parquet"), mine) as file:
            pq.write_table(rows.replace_schema_metadata(metadata), file, compression="zstd")

    def rows(self, block: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Examined rows of one block."""
        return pq.read_table(self._part(block, "parquet"), columns=columns)

    def hits(self, block: int) -> Mapping[str, int]:
        """Rules of the variety classifier -> how often they hit in the block."""
        metadata = pq.read_schema(self._part(block, "parquet")).metadata or {}
        return dict(json.loads(metadata.get(_HITS, b"{}")))

    def refused(self, block: int) -> Iterator[Refused]:
        """Bad samples of one block, by number."""
        with open(self._part(block, _REFUSED), "rb") as file:
            for line in file:
                yield Refused(**json.loads(line))

    def fingerprints(self) -> pa.Table:
        """Of all blocks, by number: `fingerprints.SCHEMA`."""
        parts = [pq.read_table(self._part(block, _FINGERPRINTS)) for block in sorted(self.done())]
        return pa.concat_tables(parts) if parts else fingerprints.SCHEMA.empty_table()

    def _part(self, block: int, kind: str) -> Path:
        return self.path / f"{block:05d}.{kind}"


def writer() -> str:
    """A mark for files aside that no other process uses."""
    return f".{socket.gethostname()}.{os.getpid()}"


def json_line(value: Mapping[str, Any]) -> bytes:
    """One line of a JSON Lines file."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
