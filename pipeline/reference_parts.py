"""Reference log-probabilities on disk: a file of the whole pass, and parts of it.

    stageN/reference/DIGEST.parquet
    stageN/reference/DIGEST.partK-of-N.parquet     every N-th global batch, from K on

Parts are computed by jobs of their own, in any order; the stage then computes only what they lack.
A global batch gives the same numbers in a part as in the whole pass, under the same layout.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.durable import replacing
from data_shards.plan import Plan

# (data set number, manifest row) -> log-probability of the (chosen, rejected) answer
Rows = dict[tuple[int, int], tuple[float, float]]
REMEDY = "remove the file to compute it again"
_PART = re.compile(r"\.part(\d{1,6})-of-(\d{1,6})\.parquet$")
_SCHEMA = pa.schema(
    [
        ("data_set", pa.int32()),
        ("row", pa.int64()),
        ("chosen", pa.float32()),
        ("rejected", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Found:
    """What the parts hold, the global batches that they lack, and why files were passed over."""

    rows: Rows
    missing: list[int]
    problems: list[str]


def packing_digest(plan: Plan) -> str:
    """SHA-256 over what stands in which global batch; parts of another packing do not fit in."""
    sizes = [plan.packs_per_step, plan.sequence_length, plan.document_multiple]
    digest = hashlib.sha256(json.dumps([*plan.names, *sizes]).encode())
    digest.update(plan.offsets.astype("<i8").tobytes())
    digest.update(plan.samples.astype("<i4").tobytes())
    return digest.hexdigest()


def part_path(whole: Path, part: int, parts: int) -> Path:
    """Where part `part` (from 0) of `parts` of the file `whole` lies."""
    return whole.with_name(f"{whole.stem}.part{part}-of-{parts}.parquet")


def write_rows(
    path: Path, rows: Mapping[tuple[int, int], tuple[float, float]], **facts: str
) -> None:
    """Write `rows` in the order of their keys, atomically; `facts` go into the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = sorted(rows)
    table = pa.table(
        {
            "data_set": [key[0] for key in keys],
            "row": [key[1] for key in keys],
            "chosen": [rows[key][0] for key in keys],
            "rejected": [rows[key][1] for key in keys],
        },
        schema=_SCHEMA.with_metadata(facts),
    )
    with replacing(path) as file:
        pq.write_table(table, file)


def read_rows(path: Path, **facts: str) -> Rows:
    """Parse a file that `write_rows` wrote with these facts.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {REMEDY}") from None
    metadata = table.schema.metadata or {}
    same = all(metadata.get(name.encode()) == value.encode() for name, value in facts.items())
    if not same or table.schema.names != _SCHEMA.names:
        raise ValueError(f"{path} belongs to other weights or data; {REMEDY}")
    columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
    return {(d, r): (chosen, rejected) for d, r, chosen, rejected in zip(*columns, strict=True)}


def read_part(path: Path, digest: str, plan: Plan, part: int, parts: int) -> Rows:
    """The rows of one part.

    Raises:
        ValueError: it belongs to other weights, data or packing, or lacks pairs.
    """
    rows = read_rows(path, digest=digest, packing=packing_digest(plan))
    if set(rows) != samples_of(plan, range(part, plan.steps, parts)):
        raise ValueError(f"{path} does not hold the pairs of part {part} of {parts}; {REMEDY}")
    return rows


def find(whole: Path, digest: str, plan: Plan) -> Found:
    """Read every part of `whole` that belongs to these weights and this packing. Raises nothing."""
    rows: Rows = {}
    problems: list[str] = []
    missing = set(range(plan.steps))
    for part, parts, path in listed(whole):
        try:
            rows |= read_part(path, digest, plan, part, parts)
            missing -= set(range(part, plan.steps, parts))
        except ValueError as error:
            problems.append(str(error))
    return Found(rows, sorted(missing), problems)


def listed(whole: Path) -> list[tuple[int, int, Path]]:
    """(part, parts, path) of every part file of `whole`, by name."""
    found = []
    for path in sorted(whole.parent.glob(f"{whole.stem}.part*-of-*.parquet")):
        name = _PART.search(path.name)
        if name is not None and int(name[1]) < int(name[2]):
            found.append((int(name[1]), int(name[2]), path))
    return found


def samples_of(plan: Plan, steps: Iterable[int]) -> set[tuple[int, int]]:
    """(data set number, manifest row) of every sample in these global batches."""
    return {
        (int(which), int(row))
        for step in steps
        for pack in plan.packs(step)
        for which, row in pack.tolist()
    }
