"""Read shards again and compare every byte with the manifest.

    python -m data_shards.validate data=demo source=captions [shards=0..7] [report=FILE] [KEY=VALUE]

Of each sample: tar headers, CRC-32 and SHA-256 of its members, the record and its tokens, and the
images, decoded as the loader decodes them. Between samples nothing but padding may lie, so a shard
without a complaint is the one that was built, byte for byte (of archives left in place: see
shard_check.py). shards=K..L are numbers, counted in the manifest's order from 0, both included;
K.. goes to the end and reports shards that nobody lists. Whoever checks shard 0 checks the manifest
and its index in full as well. Exit code: 0 all good, 1 damage found (named in the report), 2 it
could not be done.
"""

import json
import re
import sys
import time
from bisect import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import Config
from data_shards.chat import ChatTokenizer, TokenizerError
from data_shards.durable import replacing
from data_shards.manifest import Manifest, read_manifest, verify_manifest
from data_shards.records import RecordEncoder
from data_shards.shard_check import Checks, check_shard
from models.anyres import AnyresGeometry

FORMAT = 1
GOOD, DAMAGED, IMPOSSIBLE = 0, 1, 2  # exit codes
MOST_LISTED = 1000  # bad samples that a report names; all are counted


def validate(
    manifest: Manifest, first: int, last: int | None, checks: Checks, workers: int = 1
) -> dict[str, Any]:
    """Check shards `first` to `last` (included; None: all from there); the report for people.

    Raises:
        ManifestError: the manifest cannot be read, or (looked at with shard 0) is not whole.
    """
    began = time.monotonic()
    if first == 0:
        verify_manifest(manifest.path)
    listed = [shard.name for shard in manifest.info.shards]
    stop = len(listed) if last is None else min(last + 1, len(listed))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        reports = list(pool.map(lambda n: check_shard(manifest, n, checks), range(first, stop)))
    shards = [{"shard": report.name, "cause": c} for report in reports for c in report.causes]
    shards += [
        {"shard": name, "cause": "the manifest does not list it"}
        for name in _unlisted(manifest, first, last)
    ]
    bad = [sample for report in reports for sample in report.bad]
    return {
        "format": FORMAT,
        "source": manifest.info.name,
        "manifest": str(manifest.path),
        "manifest_digest": manifest.info.digest,
        "shards": [report.name for report in reports],
        "samples": sum(report.samples for report in reports),
        "images": sum(report.images for report in reports),
        "bytes": sum(report.bytes for report in reports),
        "bad_samples": len(bad),
        "bad_shards": shards,
        "bad": [asdict(sample) for sample in bad[:MOST_LISTED]],
        "seconds": round(time.monotonic() - began, 3),
    }


def _unlisted(manifest: Manifest, first: int, last: int | None) -> list[str]:
    """Archives in the folder that the manifest does not name and that, by name, would come after
    shard `first` - 1 and not after shard `last`. A folder of others may hold what it likes."""
    if manifest.info.layout is not None:
        return []
    listed = [shard.name for shard in manifest.info.shards]
    known = set(listed)
    found = []
    for path in sorted(manifest.shards_directory.glob("*.tar")):
        place = bisect(listed, path.name)  # names sort as numbers: NAME-BBBBB-NNNN.tar
        if path.name not in known and place >= first and (last is None or place <= last):
            found.append(path.name)
    return found


def summary(report: dict[str, Any]) -> str:
    """The outcome in one line."""
    counts = (
        f"{report['source']}: {len(report['shards'])} shards, {report['samples']} samples, "
        f"{report['images']} images, {report['bytes'] / 1e6:.1f} MB"
    )
    if not is_damaged(report):
        return f"{counts}, all good"
    shards = len({entry["shard"] for entry in report["bad_shards"]})
    return f"{counts}, DAMAGED: {report['bad_samples']} samples, {shards} shards"


def is_damaged(report: dict[str, Any]) -> bool:
    """Whether anything is wrong."""
    return bool(report["bad_samples"] or report["bad_shards"])


def shard_range(text: str) -> tuple[int, int | None]:
    """`K..L`, `K..` or `K` as (first, last); ValueError on anything else."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d*))?", text)
    if match is None:
        raise ValueError(f"shards={text}: write K..L, K.. or K")
    first = int(match[1])
    last = first if match[2] is None else int(match[2]) if match[2] else None
    if last is not None and last < first:
        raise ValueError(f"shards={text}: the last is before the first")
    return first, last


def _encoder(manifest: Manifest, config: Config) -> RecordEncoder | None:
    """What counts tokens anew, if tokenizer and model are those of the data set."""
    try:
        tokenizer = ChatTokenizer.from_directory(config.data.tokenizer)
    except TokenizerError as error:  # shards may be checked where no model is
        print(f"{manifest.info.name}: tokens are not counted: {error}")
        return None
    geometry = AnyresGeometry.from_model(config.model)
    info = manifest.info
    if (tokenizer.digest(), geometry.digest()) == (info.tokenizer_digest, info.geometry_digest):
        return RecordEncoder(manifest, tokenizer, geometry)
    print(f"{info.name}: tokens are not counted, it was built for another tokenizer or model")
    return None


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    from conf.compose import compose  # Hydra is for commands only

    ours = {"source": "", "shards": "0..", "report": ""}
    overrides = []
    for word in arguments:
        key, _, value = word.partition("=")
        if key in ours:
            ours[key] = value
        else:
            overrides.append(word)
    try:
        config = compose(overrides)
        first, last = shard_range(ours["shards"])
        if ours["source"] not in config.data.sources:
            known = ", ".join(config.data.sources)
            raise ValueError(f"source={ours['source']}: data.sources has {known}")
        path = Path(config.data.root) / ours["source"] / "manifest.parquet"
        manifest = read_manifest(path)
        checks = Checks(config.data.images.max_pixels, _encoder(manifest, config))
        report = validate(manifest, first, last, checks, config.data.build_workers)
        if ours["report"]:
            target = Path(ours["report"])
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as file:
                file.write(json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return IMPOSSIBLE
    for entry in [*report["bad_shards"], *report["bad"]][:MOST_LISTED]:
        where = f"sample {entry['key']} (row {entry['row']}): " if "key" in entry else ""
        print(f"{entry['shard']}: {where}{entry['cause']}")
    print(summary(report), flush=True)
    return DAMAGED if is_damaged(report) else GOOD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
