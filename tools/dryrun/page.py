"""The printed page of one stage, and what is wrong with it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

from conf.schema import Config
from pipeline.stages import MODULE_PATTERNS
from tools.dryrun import collectives, sharding
from tools.dryrun.batches import micro_batch_count
from tools.dryrun.report import Call, RankReport, short_kind
from tools.dryrun.sample import Sample

GB = 1e9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4}
_ORDER = ("tensor", "context_parallel", "pipeline", "data_parallel_group_with_cp")


def problems(
    reports: Sequence[RankReport], writers: Sequence[RankReport], whole_checkpoint: bool
) -> list[str]:
    """Everything that is wrong, each in one line; empty when the layout will do.

    `writers` are ranks that only a checkpoint was made of.
    """
    failed = [report for report in (*reports, *writers) if report.error]
    if failed:
        return _alike([f"rank {r.rank} ({r.coordinates}), {r.error}" for r in failed])
    found = [f"collectives: {problem}" for problem in collectives.differences(reports)]
    found += [f"freezing: {problem}" for problem in _freezing(reports)]
    if whole_checkpoint:
        doubled = sharding.problems([*reports, *writers])
        found += [f"checkpoint: {problem}" for problem in doubled]
    return found


def _alike(found: Sequence[str]) -> list[str]:
    """The same error of several ranks once."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for line in found:
        reason = line.split("), ", 1)[1]
        first.setdefault(reason, line)
        count[reason] += 1
    return [
        f"{line} ({count[reason]} ranks alike)" if count[reason] > 1 else line
        for reason, line in first.items()
    ]


def _freezing(reports: Sequence[RankReport]) -> Iterator[str]:
    """Gradients and optimizer state exist for what trains, and for nothing else."""
    for report in reports:
        for name, part in report.modules.items():
            where = f"rank {report.rank} ({report.coordinates}), {name}"
            if part.with_gradient != part.trainable:
                yield (
                    f"{where}: {part.trainable} numbers train, but {part.with_gradient} "
                    "have a gradient buffer"
                )
            if part.optimised != part.trainable:
                yield (
                    f"{where}: {part.trainable} numbers train, but the optimizer has "
                    f"{part.optimised}"
                )
            if part.untouched:
                yield (
                    f"{where}: {len(part.untouched)} trainable parameters got no "
                    f"gradient from the micro-batches {', '.join(report.kinds)}, first "
                    f"{part.untouched[0]}"
                )


def page(
    config: Config,
    sample: Sample,
    reports: Sequence[RankReport],
    writers: Sequence[RankReport],
    remarks: Sequence[str],
) -> Iterator[str]:
    """The stage's page, line by line, for ranks that came to the end."""
    parallel, stage = config.parallel, config.stage
    yield (
        f"{stage.name}  {config.model.name}  {parallel.world_size} ranks: tensor "
        f"{parallel.tensor}, pipeline {parallel.pipeline}"
        + (f" x {parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else "")
        + f", context {parallel.context}, data {parallel.data}"
    )
    yield f"  simulated {len(reports)} of {parallel.world_size} ranks: " + sample.reasons[0]
    yield from (f"    {reason}" for reason in sample.reasons[1:])
    count = micro_batch_count(config)
    whole = stage.global_batch_size // (stage.micro_batch_size * parallel.data)
    yield (
        f"  micro-batches {count} of {whole} a replica, {stage.micro_batch_size} x "
        f"{stage.sequence_length} tokens each: "
        + "; ".join(
            f"replica {r.coordinates.data} {', '.join(r.kinds)}" for r in _one_each(reports, "data")
        )
    )
    yield from (f"  {remark}" for remark in remarks)
    yield ""
    yield from _parameters([*reports, *writers])
    yield ""
    yield from _ranks(reports, config)
    yield ""
    yield from _groups(reports)
    places = sum((report.asked for report in reports), Counter())
    if places:
        named = ", ".join(f"{place} ({times})" for place, times in places.most_common(4))
        yield f"  numbers that do not exist were taken as 1 at: {named}"


def _parameters(reports: Sequence[RankReport]) -> Iterator[str]:
    sizes = sharding.global_sizes(reports)
    model = {k: v for k, v in sizes.items() if not k.startswith("optimizer.")}
    moments = {k: v for k, v in sizes.items() if "exp_avg." in k and "exp_avg_sq" not in k}
    total = sum(size for size, _ in model.values())
    trained = sum(size for size, _ in moments.values())
    stored = sum(size * _BYTES.get(dtype, 4) for size, dtype in sizes.values())
    pieces = sum(shard.main for report in reports for shard in report.shards)
    yield (
        f"  parameters {total / 1e9:.3f} B, trained {trained / 1e9:.3f} B; checkpoint "
        f"{stored / GB:.1f} GB: {len(sizes)} tensors in {pieces} pieces of {len(reports)} ranks"
    )


def _ranks(reports: Sequence[RankReport], config: Config) -> Iterator[str]:
    """One line for each kind of rank: the pipeline stage decides what it holds."""
    yield (
        f"  {'rank':<26}{'vision':>9}{'connector':>11}{'language':>10}{'trains':>9}"
        f"{'weights':>10}{'gradients':>11}{'optimizer':>11}"
    )
    lines: dict[str, list[RankReport]] = {}
    for report in reports:
        cells = [f"{report.modules[name].parameters / 1e6:.1f} M" for name in MODULE_PATTERNS]
        trains = sum(part.trainable for part in report.modules.values())
        sizes = [f"{report.bytes[name] / GB:.3f} GB" for name in report.bytes]
        widths = (9, 11, 10, 9, 10, 11, 11)
        values = [*cells, f"{trains / 1e6:.1f} M" if trains else "nothing", *sizes]
        text = "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
        lines.setdefault(text, []).append(report)
    for text, alike in lines.items():
        first = alike[0]
        name = f"{first.rank} ({first.coordinates})"
        more = f"  and {len(alike) - 1} more" if len(alike) > 1 else ""
        yield f"  {name:<26}{text}{more}"


def _groups(reports: Sequence[RankReport]) -> Iterator[str]:
    groups = collectives.by_group(reports)
    yield (
        f"  {'groups':<32}{'of ranks':>9}{'seen':>6}{'members':>10}{'calls':>12}{'GB':>10}"
        "  digest of the first"
    )
    kinds: dict[tuple[str, int], list[collectives.GroupCalls]] = {}
    for entry in groups:
        kinds.setdefault((entry.group.kind, len(entry.group.ranks)), []).append(entry)
    for (kind, size), entries in sorted(kinds.items(), key=lambda item: _rank_of(item[0][0])):
        members = [
            entry.collective[rank] + entry.point_to_point[rank]
            for entry in entries
            for rank in entry.collective
        ]
        moved = max(sum(_moved(call, size) for call in calls) for calls in members)
        compared = sum(len(entry.collective) for entry in entries if len(entry.collective) > 1)
        calls = sorted({len(member) for member in members})
        shown = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]}-{calls[-1]}"
        yield (
            f"  {short_kind(kind):<32}{size:>9}{len(entries):>6}{compared:>10}{shown:>12}"
            f"{moved / GB:>10.2f}  {entries[0].digest}"
        )
    yield f"  all calls of all simulated ranks: {collectives.digest(reports)}"


def _moved(call: Call, size: int) -> float:
    """Bytes of the whole tensor; a gather's and a scatter's parts are one rank's."""
    if call.op == "recv":
        return 0
    parts = size if call.op in ("all_gather", "reduce_scatter") else 1
    return prod(call.shape) * _BYTES.get(call.dtype, 1) * parts


def _rank_of(kind: str) -> tuple[int, str]:
    name = short_kind(kind)
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _one_each(reports: Sequence[RankReport], what: str) -> list[RankReport]:
    found: dict[int, RankReport] = {}
    for report in reports:
        found.setdefault(getattr(report.coordinates, what), report)
    return list(found.values())
