"""The last phase of a build: manifest, quarantine, rule hits, card, and the name."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import PIL
import pyarrow as pa

from data_shards import in_place
from data_shards.build_plan import BuildError, BuildPlan, Target
from data_shards.card import write_card
from data_shards.durable import replacing
from data_shards.manifest import ManifestInfo
from data_shards.manifest_writer import ManifestWriter
from data_shards.quarantine import (
    FOLDER,
    REASONS,
    duplicate_entry,
    refused_entry,
    write_quarantine,
)
from data_shards.sources import open_source
from data_shards.writer import ShardInfo

HITS = "hits.json"


def finish(target: Target, plan: BuildPlan) -> None:
    """Complete a data set all of whose blocks are written, and publish it.

    Raises:
        BuildError: no sample is left.
    """
    folder, blocks = target.folder, target.examination.blocks()
    rejected = [folder.rejected_path(block.number) for block in blocks]
    kinds: Counter[str] = Counter()
    write_quarantine(folder.building, _entries(target, kinds), rejected)
    source = target.examination.settings.source
    shards: list[ShardInfo] = []
    n_samples: Counter[int] = Counter()  # of each archive that stays in place
    with ManifestWriter(folder.building) as writer:
        for block in blocks:
            first = len(shards)
            for part in folder.parts(block.number):
                shards += [part.shard] if part.shard else []
                if part.rows.num_rows:
                    writer.add(_renumbered(part.rows, first))
                    n_samples.update(part.rows["shard"].to_pylist() if source.in_place else [])
        if not writer.rows:
            raise BuildError(_nothing_left(target, kinds))
        info = writer.close(
            ManifestInfo(
                name=target.name,
                preference=source.preference,
                tokenizer_digest=plan.tokenizer_digest,
                geometry_digest=plan.geometry.digest(),
                pillow=PIL.__version__,
                inputs_digest=target.digest,
                quarantined=sum(kinds.values()),
                **_shards(target, shards, n_samples),
            )
        )
        samples = writer.rows
    folder.drop_unlisted({shard.name for shard in shards})
    _write_hits(target)
    write_card(folder.building, target.name)
    folder.publish()
    size = sum(shard.size for shard in info.shards)
    print(
        f"{target.name}: {samples} samples, {kinds['refused']} refused, "
        f"{kinds['duplicate']} duplicates, {size / 1e6:.1f} MB",
        flush=True,
    )


def _shards(
    target: Target, written: list[ShardInfo], n_samples: Mapping[int, int]
) -> dict[str, Any]:
    """The shards that were written, or those of others that stay where they are."""
    settings = target.examination.settings
    if not settings.source.in_place:
        return {"shards": tuple(written)}
    files = open_source(settings.name, settings.source).files
    return in_place.manifest_facts(settings.source, files, n_samples)


def _renumbered(rows: pa.Table, first: int) -> pa.Table:
    """Shards counted over the data set instead of the block."""
    index = rows.schema.get_field_index("shard")
    shards = pa.array(rows["shard"].to_numpy() + first, pa.int32())
    return rows.set_column(index, rows.schema.field(index), shards)


def _entries(target: Target, kinds: Counter[str]) -> Iterator[dict[str, Any]]:
    """Lines of reasons.jsonl in the order of the rows; counts their kinds."""
    examined = target.examination.folder
    for block in target.examination.blocks():
        found = [(one.number, refused_entry(one)) for one in examined.refused(block.number)]
        stop = block.first_number + block.rows
        duplicates = target.folder.duplicates(block.first_number, stop)
        if duplicates:
            table = examined.rows(block.number, ["number", "origin"])
            origins = dict(
                zip(table["number"].to_pylist(), table["origin"].to_pylist(), strict=True)
            )
            found += [(n, duplicate_entry(n, origins[n], why)) for n, why in duplicates.items()]
        for _, entry in sorted(found, key=lambda pair: pair[0]):
            kinds[entry["kind"]] += 1
            yield entry


def _write_hits(target: Target) -> None:
    """How often each rule of the variety classifier hit, in the good samples of the source
    (duplicates included)."""
    hits: Counter[str] = Counter()
    for block in target.examination.blocks():
        hits.update(target.examination.folder.hits(block.number))
    with replacing(target.folder.building / HITS) as file:
        file.write(json.dumps(dict(sorted(hits.items())), ensure_ascii=False).encode())


def _nothing_left(target: Target, kinds: Counter[str]) -> str:
    path = target.folder.building / FOLDER / REASONS
    with open(path, encoding="utf-8") as file:
        line = file.readline()
    entry = json.loads(line) if line else None
    first = f", the first ({entry['origin']}): {entry['reason']}" if entry else ""
    return (
        f"{target.name}: no sample is usable, {kinds['refused']} rows refused, "
        f"{kinds['duplicate']} duplicates{first}; see {path} and correct "
        f"data.sources.{target.name}"
    )
