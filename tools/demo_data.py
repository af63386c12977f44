"""Write the demo's sources and evaluation sets as Parquet files.

    python -m tools.demo_data [out=runs/demo/raw] [seed=0] [scale=1]

`out/NAME/train.parquet` for captions, vqa, text, style and preferences; `out/evaluation/` with
{dev,held_out}.parquet (questions) and {dev,held_out}_pairs.parquet (preference pairs). Settings
are chosen on dev; held_out is scored once. A second run with the same settings does nothing.
`scale` multiplies the number of training rows, for quick trials.
"""

import sys
import time
from pathlib import Path

from tools.command import run, split_arguments
from tools.demo.done import DATA_FILES, is_done, settings_digest, write_done
from tools.demo.evaluation import PAIR_SCHEMA, QUESTION_SCHEMA, pair_rows, question_rows
from tools.demo.sources import SOURCES, TRAINING_SCHEMA, Counts, training_rows, write_parquet

USAGE = "python -m tools.demo_data [out=runs/demo/raw] [seed=0] [scale=1]"


def write_demo_data(out: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """Write everything under `out`; False if it was there already, from the same settings.

    Raises ValueError for a scale that leaves a source empty.
    """
    counts = Counts()
    wanted = {name: round(getattr(counts, name) * scale) for name in SOURCES}
    if min(wanted.values()) < 1:
        raise ValueError(f"scale={scale} leaves a source without rows; use a larger one")
    settings = {"seed": seed, "rows": wanted, "counts": counts._asdict()}
    digest = settings_digest(settings, DATA_FILES)
    marker = out / "DONE.json"
    if is_done(marker, digest):
        print(f"{out} is up to date")
        return False
    marker.unlink(missing_ok=True)
    start = time.monotonic()
    rows: dict[str, int] = {}
    for name, n in wanted.items():
        path = out / name / "train.parquet"
        rows[name] = write_parquet(training_rows(name, n, seed), TRAINING_SCHEMA, path)
        print(f"{path}: {rows[name]} rows, {time.monotonic() - start:.1f} s", flush=True)
    for split in ("dev", "held_out"):
        path = out / "evaluation" / f"{split}.parquet"
        rows[split] = write_parquet(
            question_rows(split, counts.questions, seed), QUESTION_SCHEMA, path
        )
        path = out / "evaluation" / f"{split}_pairs.parquet"
        rows[f"{split}_pairs"] = write_parquet(
            pair_rows(split, counts.pairs, seed), PAIR_SCHEMA, path
        )
    print(f"{out / 'evaluation'}: dev and held_out, {time.monotonic() - start:.1f} s")
    write_done(marker, digest, {"seed": seed, "rows": rows})
    return True


def main(arguments: list[str]) -> None:
    """Parse `key=value` words and write."""
    given, unknown = split_arguments(arguments, ["out", "seed", "scale"])
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; usage: {USAGE}")
    try:
        seed, scale = int(given.get("seed", "0")), float(given.get("scale", "1"))
    except ValueError:
        raise ValueError(f"seed= takes an integer and scale= a number; usage: {USAGE}") from None
    write_demo_data(Path(given.get("out", "runs/demo/raw")), seed, scale)


if __name__ == "__main__":
    sys.exit(run(main))
