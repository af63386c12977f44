"""The demo's data as packed batches, also as a file for a machine that has only torch:

    python -m tools.benchmarks.demo_batches [out=runs/bench/demo_batches.npz] [steps=200]
        [sequence_length=2048] [packs=2] [scale=1] [work=runs/bench] [stage=stage2]

Pictures, tokenizer and shards are made once under `work` (half a minute); no backbone is trained.
"""

import sys
import time
from itertools import islice
from pathlib import Path

from tools.command import run, split_arguments

USAGE = "python -m tools.benchmarks.demo_batches [out=FILE.npz] [steps=200] [sequence_length=2048]"
NAMES = ("out", "steps", "sequence_length", "packs", "scale", "work", "stage")


def prepare(work: Path, scale: float) -> None:
    """Sources, tokenizer and shards of the demo under `work`, each unless it is there."""
    from conf.compose import compose
    from data_shards.build import build_all
    from tools.demo_data import write_demo_data
    from tools.make_backbones import make_tokenizer

    write_demo_data(work / "raw", scale=scale)
    config = compose(demo_words(work, "stage2"))
    if not (work / "import" / "tokenizer").is_dir():
        make_tokenizer(work / "import" / "tokenizer", config.model)
    build_all(config.data, config.model)


def demo_words(work: Path, stage: str, *more: str) -> list[str]:
    """Overrides of a stage of the demo that reads from `work`."""
    return [
        "model=tiny",
        f"stage={stage}",
        "data=demo",
        f"runs_dir={work.parent}",
        f"run={work.name}",
        "parallel=single",
        *more,
    ]


def stage_data(work: Path, stage: str, *more: str):  # type: ignore[no-untyped-def]
    """(configuration, `pipeline.data.StageData`) of a stage, without any process group."""
    import torch

    from conf.compose import compose
    from pipeline.data import open_data
    from pipeline.distributed import Ranks

    config = compose(demo_words(work, stage, *more))
    alone = Ranks(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        data=0,
        data_size=1,
        context=0,
        context_size=1,
        first_stage=True,
        last_stage=True,
        reports=True,
    )
    return config, open_data(config, alone)


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    given, unknown = split_arguments(arguments, NAMES)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; usage: {USAGE}")
    try:
        steps, length = int(given.get("steps", "200")), int(given.get("sequence_length", "2048"))
        packs, scale = int(given.get("packs", "2")), float(given.get("scale", "1"))
    except ValueError:
        raise ValueError(
            f"steps=, sequence_length=, packs= and scale= take numbers; {USAGE}"
        ) from None
    work, stage = Path(given.get("work", "runs/bench")), given.get("stage", "stage2")
    out = Path(given.get("out", str(work / "demo_batches.npz")))
    from tools.benchmarks.batches import write_batches

    started = time.monotonic()
    prepare(work, scale)
    _, data = stage_data(
        work,
        stage,
        f"stage.sequence_length={length}",
        f"stage.global_batch_size={packs}",
        f"stage.micro_batch_size={packs}",
        f"stage.steps={steps}",
    )
    write_batches(out, [micro for _, micro in islice(data.batches(0), steps)])
    print(
        f"{out}: {steps} steps of {packs} packs of {length} tokens, {out.stat().st_size / 1e6:.1f} "
        f"MB, {data.plan.report['efficiency']:.3f} of the tokens real; "
        f"{time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(run(main))
