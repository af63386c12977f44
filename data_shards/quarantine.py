"""The quarantine of a data set: every row that was left out with its reason, and some of the bad
samples themselves.

    NAME/quarantine/reasons.jsonl   {"origin", "key", "reason", "kind"}: refused, or duplicate
    NAME/quarantine/samples.tar     KEY.json (the row as it was read) and KEY.N.bin (its images)

Of the refused samples the first `MOST_SAMPLES` are kept, as far as they have no more than
`MOST_BYTES` each and `MOST_BYTES_OF_ALL` together. Nothing in there is checked: the files are for
people who look into what was refused, never for training.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_shards.durable import replacing
from data_shards.examined import ExaminedFolder, json_line, writer
from data_shards.prepare import Refused, key_of
from data_shards.sources.blocks import Block
from data_shards.sources.rows import SourceRow
from data_shards.writer import tar_header

FOLDER, REASONS, SAMPLES = "quarantine", "reasons.jsonl", "samples.tar"
MOST_SAMPLES = 200
MOST_BYTES = 4 << 20  # of one sample
MOST_BYTES_OF_ALL = 256 << 20
_TAR = 512
REFUSED, DUPLICATE = "refused", "duplicate"


def first_refused(examined: ExaminedFolder, blocks: Iterable[Block]) -> list[int]:
    """Rows whose bad samples are kept: the first that were refused."""
    numbers: list[int] = []
    for block in blocks:
        numbers += [refused.number for refused in examined.refused(block.number)]
        if len(numbers) >= MOST_SAMPLES:
            break
    return numbers[:MOST_SAMPLES]


def sample_members(row: SourceRow) -> list[tuple[str, bytes]] | None:
    """(name, content) of a bad row as it was read; None where it is too large."""
    blobs: list[bytes] = []

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            blobs.append(value)
            return f"{key_of(row.number)}.{len(blobs) - 1}.bin"
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    try:
        values = plain(row.values)
        record = json.dumps({"origin": row.origin, **values}, default=repr).encode()
        blobs += [data for _, data in row.attached]
    except (ValueError, RecursionError):
        return None
    members = [(f"{key_of(row.number)}.json", record)]
    members += [(f"{key_of(row.number)}.{n}.bin", blob) for n, blob in enumerate(blobs)]
    return members if sum(len(data) for _, data in members) <= MOST_BYTES else None


class RejectedWriter:
    """Bad samples of one block, as a tar that a kill leaves whole or absent."""

    def __init__(self) -> None:
        self._content = io.BytesIO()

    def add(self, row: SourceRow) -> None:
        """Keep one row, if it is not too large."""
        for name, data in sample_members(row) or ():
            self._content.write(tar_header(name, len(data)))
            self._content.write(data)
            self._content.write(b"\0" * (-len(data) % _TAR))

    def close(self, path: Path) -> None:
        """Write what was kept, if anything was."""
        if self._content.tell():
            with replacing(path, writer()) as file:
                file.write(self._content.getvalue() + b"\0" * 2 * _TAR)


def write_quarantine(
    folder: Path, entries: Iterable[dict[str, Any]], rejected: Iterable[Path]
) -> int:
    """Write `folder`/quarantine; returns the number of entries.

    Args:
        entries: lines of reasons.jsonl, in order.
        rejected: archives of the blocks, in order; missing ones have nothing.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    count = 0
    with replacing(target / REASONS) as file:
        for entry in entries:
            file.write(json_line(entry))
            count += 1
    size = 0
    with replacing(target / SAMPLES) as file:
        for content in _samples(rejected):
            size += len(content)
            if size > MOST_BYTES_OF_ALL:
                break
            file.write(content)
        file.write(b"\0" * 2 * _TAR)
    return count


def _samples(archives: Iterable[Path]) -> Iterator[bytes]:
    """One sample's members after another, headers and padding included."""
    for path in archives:
        if not path.exists():
            continue
        content = path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            ends: dict[str, tuple[int, int]] = {}
            for member in archive:
                key = member.name.partition(".")[0]
                end = member.offset_data + member.size + -member.size % _TAR
                ends[key] = (ends.get(key, (member.offset, 0))[0], end)
        for first, end in ends.values():
            yield content[first:end]


def refused_entry(refused: Refused) -> dict[str, Any]:
    """A line of reasons.jsonl."""
    return {
        "origin": refused.origin,
        "key": refused.key,
        "reason": refused.reason,
        "kind": REFUSED,
    }


def duplicate_entry(number: int, origin: str, reason: str) -> dict[str, Any]:
    """A line of reasons.jsonl."""
    return {"origin": origin, "key": key_of(number), "reason": reason, "kind": DUPLICATE}
