"""The whole pipeline in miniature: python -m tools.demo [run=demo] [KEY=VALUE ...]

Scanned digits become pictures and pt-PT chats, tiny backbones are trained and imported, shards are
built, stages 1 to 3 run through the launcher, each is exported and scored by plain transformers,
and `runs/NAME/report.html` and `report.json` tell the story. What is finished is skipped, so the
same command goes on where it was stopped. Further `KEY=VALUE` go to `slurm.submit`
(`stage2:stage.steps=100` is for stage 2 only).
"""

import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from pipeline.files import write_json
from tools.command import split_arguments
from tools.evaluate import evaluate, evaluation_sets, export_directory
from tools.phases import Phase, PhaseRecord, command

STAGES = ("stage1", "stage2", "stage3")
# On two cores; tensor parallelism in one stage shows that it works, data parallelism is faster.
LAYOUTS = {"stage1": "tp2", "stage2": "dp2", "stage3": "dp2"}
NO_TILING_STAGE = "stage2"  # the stage whose goal is stated over all questions
THREADS = 2


def phases(name: str, runs_dir: Path, overrides: Sequence[str]) -> list[Phase]:
    """Everything before the report, in order."""
    directory = runs_dir / name
    raw, backbones, shards = (directory / part for part in ("raw", "backbones", "data"))
    imported = directory / "import" / "DONE.json"
    common = [f"run={name}", f"runs_dir={runs_dir}", "model=tiny", "data=demo"]
    shared = [word for word in overrides if word.startswith(("model.", "data."))]
    found = [
        Phase(
            "data",
            "pictures, questions and preference pairs from scanned digits",
            partial(command, "tools.demo_data", f"out={raw}"),
            [raw / "DONE.json"],
            skips_itself=True,
        ),
        Phase(
            "backbones",
            "a SigLIP and a Llama, trained from nothing",
            partial(command, "tools.make_backbones", f"out={backbones}", "model=tiny", *shared),
            [backbones / part for part in ("vision", "language", "tokenizer")],
            skips_itself=True,
        ),
        Phase(
            "import",
            "Hugging Face backbones to a Megatron checkpoint",
            partial(
                command,
                "tools.hf_import",
                "model=tiny",
                *(f"{part}={backbones / part}" for part in ("vision", "language", "tokenizer")),
                f"out={directory / 'import'}",
                *shared,
            ),
            [imported],
            [backbones / f"{part}.DONE.json" for part in ("vision", "language")],
            partial(_import_again, directory / "import"),
        ),
        Phase(
            "shards",
            "sources to tar shards and manifests",
            partial(command, "data_shards.build", *common, *shared),
            [shards],
            [imported, raw / "DONE.json"],
            skips_itself=True,
        ),
    ]
    for number, stage in enumerate(STAGES):
        before = STAGES[number - 1] if number else "import"
        found += _stage_phases(directory, stage, before, [*common, *overrides])
    export = export_directory(directory, STAGES[-1])
    found.append(
        Phase(
            "held_out",
            "held-out questions and pairs, scored once",
            partial(_score_held_out, directory),
            [directory / "evaluation" / "held_out.json"],
            [export / "README.md", *(directory / stage / "DONE.json" for stage in STAGES)],
        )
    )
    return found


def _stage_phases(
    directory: Path, stage: str, before: str, arguments: Sequence[str]
) -> list[Phase]:
    """Train, export, and score on the development split, for information."""
    done, export = directory / stage / "DONE.json", export_directory(directory, stage)
    layout = [] if any("parallel=" in word for word in arguments) else [LAYOUTS[stage]]
    words = [word for word in arguments if ":" not in word or word.startswith(f"{stage}:")]
    return [
        Phase(
            stage,
            "training through the launcher",
            partial(
                command,
                "slurm.submit",
                f"stages=[{stage}]",
                *words,
                *(f"parallel={name}" for name in layout),
            ),
            [done],
            [directory / before / "DONE.json"],
            partial(_refuse_stale, directory / stage, before),
        ),
        Phase(
            f"export_{stage}",
            f"Megatron checkpoint to {export}",
            partial(_export, directory / stage, export),
            [export],
            [done],
            partial(_remove, export),
        ),
        Phase(
            f"dev_{stage}",
            "development questions, for choosing settings",
            partial(_score_dev, directory, stage),
            [directory / stage / "evaluation" / "dev.json"],
            [done],
        ),
    ]


def _refuse_stale(stage_directory: Path, before: str, known: bool) -> None:
    if known:  # else the launcher decides
        raise ValueError(
            f"{stage_directory} was trained from another {before} than is there now; remove "
            f"{stage_directory} to train it again"
        )


def _import_again(imported: Path, known: bool) -> None:
    if known:  # other backbones
        shutil.rmtree(imported)


def _remove(export: Path, _known: bool) -> None:
    shutil.rmtree(export)


def _export(stage_directory: Path, out: Path) -> None:
    from tools.hf_export import Request, export

    export(Request(stage_directory, out))


def _score_dev(directory: Path, stage: str) -> None:
    from tools.evaluate import summary

    sets, export = evaluation_sets(directory), export_directory(directory, stage)
    result = evaluate(export, sets / "dev.parquet", sets / "dev_pairs.parquet")
    out = directory / stage / "evaluation" / "dev.json"
    out.parent.mkdir(exist_ok=True)
    write_json(out, result)
    print(summary(result), flush=True)


def _score_held_out(directory: Path) -> None:
    sets = evaluation_sets(directory)
    questions, pairs = sets / "held_out.parquet", sets / "held_out_pairs.parquet"
    results = {}
    for stage in STAGES:
        trainer = directory / stage if stage == STAGES[-1] else None
        results[stage] = evaluate(export_directory(directory, stage), questions, pairs, trainer)
    export = export_directory(directory, NO_TILING_STAGE)
    results["no_tiling"] = evaluate(export, questions, tiling=False)
    results["no_tiling"]["stage"] = NO_TILING_STAGE
    out = directory / "evaluation" / "held_out.json"
    out.parent.mkdir(exist_ok=True)
    write_json(out, results)


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    import torch

    from tools.report import goals_text, write_report

    signal.signal(signal.SIGTERM, _end)
    ours, overrides = split_arguments(arguments, ("run", "runs_dir"))
    name, runs_dir = ours.get("run", "demo"), Path(ours.get("runs_dir", "runs"))
    directory = runs_dir / name
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    record = PhaseRecord(directory)
    for phase in phases(name, runs_dir, overrides):
        record.run(phase)
    report = write_report(directory)
    print(goals_text(report))
    print(f"the whole story: {directory / 'report.html'}")
