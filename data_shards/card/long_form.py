"""The figures as a table in long form: set, metric, label, value. For people who count further."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.card.figures import SIDE_STEPS, Figures, quantile
from data_shards.durable import replacing

FILE_NAME = "card.parquet"
SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("metric", pa.string()),
        ("label", pa.string()),
        ("value", pa.float64()),  # null where the label says it all, as of a digest
    ]
)
Row = tuple[str, str, float | None]


def write_long_form(path: Path, figures: Figures) -> None:
    """Write card.parquet."""
    metrics, labels, values = zip(*rows(figures), strict=True)
    columns = [[figures.name] * len(metrics), metrics, labels, values]
    table = pa.Table.from_arrays(
        [pa.array(column, f.type) for column, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def rows(figures: Figures) -> Iterator[Row]:
    """(metric, label, value) of every figure; histograms leave out what is zero."""
    info, total = figures.info, figures.total
    counts = {
        "rows read": figures.rows_read,
        "samples": figures.samples,
        "refused": figures.n_refused,
        "duplicates": figures.n_duplicates,
        "images": total["images"],
        "tiles": total["tiles"],
        "tokens": total["tokens"] + total["tokens_rejected"],
        "tokens to train on": total["target_tokens"] + total["target_tokens_rejected"],
        "shards": len(info.shards),
        "bytes of shards": total["bytes"],
        "bytes of images": total["image_bytes"],
    }
    yield from (("count", label, value) for label, value in counts.items())
    for metric, counted in (
        ("licence", info.licences),
        ("language", info.languages),
        ("variety", info.varieties),
        ("rule hits", figures.hits),
    ):
        yield from ((metric, label, value) for label, value in sorted(counted.items()))
    for kind, reason in sorted(figures.refused.items()):
        yield "refused", kind, reason.count
    for (kind, against), reason in sorted(figures.duplicates.items()):
        yield "duplicates", f"{kind} | {against}", reason.count
    for metric, histogram in (
        ("tokens of a document", figures.tokens),
        ("tiles of a sample", figures.tiles),
        ("images of a sample", figures.images),
    ):
        yield from ((metric, str(v), int(histogram[v])) for v in histogram.nonzero()[0].tolist())
        for share in (0.5, 0.95):
            yield f"{metric}, quantile", str(share), quantile(histogram, share)
    for row, column in zip(*(axis.tolist() for axis in figures.sides.nonzero()), strict=True):
        sides = [round(2 ** (step / SIDE_STEPS)) for step in (column, row)]
        label = f"from {sides[0]} x {sides[1]} px"
        yield "width x height of an image", label, int(figures.sides[row, column])
    for metric, text in (
        ("manifest digest", info.digest),
        ("tokenizer digest", info.tokenizer_digest),
        ("geometry digest", info.geometry_digest),
        ("inputs digest", info.inputs_digest),
        ("Pillow", info.pillow),
    ):
        yield metric, text, None
