"""The two phases of one block, each the work of one process: examine it, write its shards."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from data_shards import in_place
from data_shards.dataset_folder import DatasetFolder, Part
from data_shards.examined import MANIFEST_COLUMNS, BlockResult, ExaminedFolder, writer
from data_shards.manifest import rows_to_table
from data_shards.prepare import Content, Examined, Preparer, Refused, SourceChanged, key_of
from data_shards.quarantine import RejectedWriter
from data_shards.sources import Source
from data_shards.sources.blocks import Block
from data_shards.sources.rows import SourceRow
from data_shards.writer import Member, ShardWriter

Tick = Callable[[int, int], None]  # rows done and refused since the last call
_EVERY = 32  # rows between ticks
_GROUP = 16  # rows that are examined together, and are in memory at once


def examine_block(
    source: Source, block: Block, preparer: Preparer, folder: ExaminedFolder, tick: Tick
) -> None:
    """Check every row of a block, tokenise and hash it; writes no shard."""
    result = BlockResult()
    rows = refused = 0
    for one in _results(source, block, preparer):
        result.add(one)
        rows, refused = rows + 1, refused + isinstance(one, Refused)
        if rows == _EVERY:
            tick(rows, refused)
            rows = refused = 0
    folder.write(block.number, result)
    tick(rows, refused)


def _results(source: Source, block: Block, preparer: Preparer) -> Iterator[Examined | Refused]:
    if source.config.in_place:
        yield from in_place.results(source, block, preparer)
        return
    rows = source.rows(block)
    while group := list(islice(rows, _GROUP)):
        yield from preparer.examine_all(group)


def write_block(
    source: Source,
    block: Block,
    preparer: Preparer,
    examined: ExaminedFolder,
    folder: DatasetFolder,
    shard_bytes: int,
    tick: Tick,
) -> None:
    """Write the shards of a block, from the first that is not finished on.

    Raises:
        SourceChanged: a row is not what was examined.
    """
    work = _BlockWriter(source, block, preparer, examined, folder, shard_bytes)
    if source.config.in_place:
        work.index(tick)
    else:
        work.run(tick)


class _BlockWriter:
    def __init__(
        self,
        source: Source,
        block: Block,
        preparer: Preparer,
        examined: ExaminedFolder,
        folder: DatasetFolder,
        shard_bytes: int,
    ):
        self._source, self._block, self._preparer = source, block, preparer
        self._folder, self._shard_bytes = folder, shard_bytes
        stop = block.first_number + block.rows
        self._left_out = folder.duplicates(block.first_number, stop)
        self._rejected = folder.rejected()
        self._examined = examined.rows(block.number)

    def run(self, tick: Tick) -> None:
        """Fill shards one after the other; one is full when the next sample would pass the size."""
        finished = list(self._folder.parts(self._block.number))
        if finished and finished[-1].last:
            return
        wanted = self._wanted(finished[-1].next_number if finished else 0)
        facts = next(wanted, None)
        number, writer_ = len(finished), None
        rows: list[dict[str, Any]] = []
        rejected = RejectedWriter()
        ticked = 0
        try:
            for row in self._source.rows(self._block):
                ticked += 1
                if ticked == _EVERY:
                    tick(ticked, 0)
                    ticked = 0
                if row.number in self._rejected:
                    rejected.add(row)
                if facts is None or row.number < facts["number"]:
                    continue
                _check_number(row, facts)
                contents = self._preparer.members(row, facts)
                size = sum(1024 + len(content.data) for content in contents)
                if writer_ is not None and writer_.size + size > self._shard_bytes:
                    self._finish(writer_, number, rows, row.number, last=False)
                    number, writer_, rows = number + 1, None, []
                if writer_ is None:
                    path = self._folder.shard_path(self._block.number, number)
                    writer_ = ShardWriter(path, writer())
                rows.append(_add(writer_, number, facts, contents))
                facts = next(wanted, None)
            if facts is not None:
                raise _missing(facts)
            rejected.close(self._folder.rejected_path(self._block.number))
            self._finish(writer_, number, rows, self._block.first_number + self._block.rows, True)
            tick(ticked, 0)
        finally:
            if writer_ is not None:
                writer_.discard()

    def index(self, tick: Tick) -> None:
        """As `run`, of archives that stay in place: manifest rows and no shards."""
        if any(part.last for part in self._folder.parts(self._block.number)):
            return
        rejected = RejectedWriter()
        if self._rejected:
            for row in self._source.rows(self._block):
                if row.number in self._rejected:
                    rejected.add(row)
        rows = list(in_place.manifest_rows(self._source, self._block, self._wanted(0)))
        rejected.close(self._folder.rejected_path(self._block.number))
        self._finish(None, 0, rows, self._block.first_number + self._block.rows, True)
        tick(self._block.rows, 0)

    def _finish(
        self,
        shard_writer: ShardWriter | None,
        number: int,
        rows: list[dict[str, Any]],
        next_number: int,
        last: bool,
    ) -> None:
        shard = shard_writer.close() if shard_writer is not None else None
        part = Part(shard, next_number, last, rows_to_table(rows))
        self._folder.write_part(self._block.number, number, part)

    def _wanted(self, begin: int) -> Iterator[dict[str, Any]]:
        """Examined rows from number `begin` on, less the duplicates, in order."""
        for batch in self._examined.to_batches(256):
            for facts in batch.to_pylist():
                if facts["number"] >= begin and facts["number"] not in self._left_out:
                    yield facts


def _check_number(row: SourceRow, facts: Mapping[str, Any]) -> None:
    if row.number != facts["number"]:
        raise _missing(facts)


def _missing(facts: Mapping[str, Any]) -> SourceChanged:
    return SourceChanged(
        f"{facts['source']}: row {facts['origin']} is no longer in its file, which was changed "
        "meanwhile; when that is done, give the same command again"
    )


def _add(
    shard_writer: ShardWriter, shard: int, facts: Mapping[str, Any], contents: list[Content]
) -> dict[str, Any]:
    """Write one sample; returns its manifest row."""
    key = key_of(facts["number"])
    pairs = [(content.extension, content.data) for content in contents]
    record, *images = shard_writer.add(key, pairs, [content.sha256 for content in contents])
    columns = {name: facts[name] for name in MANIFEST_COLUMNS}
    return {
        "key": key,
        "shard": shard,
        **{f"json_{column}": value for column, value in _place(record).items()},
        "images": [
            {**_place(member), **{name: image[name] for name in ("width", "height", "tiles")}}
            for member, image in zip(images, facts["images"], strict=True)
        ],
        **columns,
    }


def _place(member: Member) -> dict[str, Any]:
    names = ("offset", "size", "crc32", "sha256")
    return {name: getattr(member, name) for name in names}
