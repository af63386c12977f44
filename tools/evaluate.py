"""Score an export: exact match, tiling off, preference rate, and against the trainer's network.

    python -m tools.evaluate run=demo [stage=stage3] [split=held_out]
    python -m tools.evaluate export=DIR questions=FILE out=FILE [pairs=FILE] [trainer=STAGE]

The first form is the demo's: its evaluation files (in `sets=`), the export of that stage, and the
result in `runs/NAME/stageN/evaluation/SPLIT.json`. `tiling=false` scores with one tile beside the
base tile; `batch=` is the number of questions decoded at once.
"""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_json
from tools.command import required, run, split_arguments
from tools.hf_answers import ExportedModel
from tools.questions import (
    Pair,
    Question,
    chance,
    exact_match,
    read_pairs,
    read_questions,
)

USAGE = "python -m tools.evaluate run=NAME | export=DIR questions=FILE [pairs=FILE] out=FILE"
ARGUMENTS = (
    "run",
    "runs_dir",
    "stage",
    "split",
    "sets",
    "export",
    "questions",
    "pairs",
    "trainer",
    "tiling",
    "batch",
    "out",
)
COMPARED_QUESTIONS = 36
LAST_STAGE = "stage3"


def export_directory(run_directory: Path, stage: str) -> Path:
    """Where the demo exports a stage: `hf/` of the run for the last, of the stage for others."""
    return run_directory / "hf" if stage == LAST_STAGE else run_directory / stage / "hf"


def evaluation_sets(run_directory: Path) -> Path:
    """Where the demo keeps its dev and held-out questions and pairs."""
    return run_directory / "raw" / "evaluation"


def score_questions(
    model: ExportedModel, questions: Sequence[Question], batch: int = 50
) -> dict[str, Any]:
    """Exact match overall, by kind and by layout, chance, and every answer."""
    began = time.perf_counter()
    answers = model.answers(questions, batch)
    return {
        "exact_match": exact_match(questions, answers),
        "chance": chance(questions),
        "answers": answers,
        "seconds": round(time.perf_counter() - began, 3),
    }


def score_pairs(model: ExportedModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Share of pairs with logp(chosen) > logp(rejected), by kind, and the mean difference."""
    log_probs = model.log_probs(pairs)
    margins = (log_probs[:, 0] - log_probs[:, 1]).tolist()
    kinds: dict[str, list[float]] = {}
    for pair, margin in zip(pairs, margins, strict=True):
        kinds.setdefault(pair.kind, []).append(margin)
    return {
        "rate": {kind: sum(m > 0 for m in found) / len(found) for kind, found in kinds.items()},
        "mean_margin": {kind: sum(found) / len(found) for kind, found in kinds.items()},
        "count": {kind: len(found) for kind, found in kinds.items()},
    }


@torch.inference_mode()
def compare_with_trainer(
    model: ExportedModel, questions: Sequence[Question], stage: Path
) -> dict[str, Any]:
    """The export against the trainer's checkpoint, on the same pictures and questions.

    Raises ValueError when the two tokenise a prompt differently.
    """
    from tools.trainer_answers import trainer_model

    with trainer_model(stage) as trainer:
        ids = [trainer.prompt_ids(question) for question in questions]
        ours = trainer.logits(questions, ids)
        largest = 0.0
        for question, row, logits in zip(questions, ids, ours, strict=True):
            inputs = model.inputs([model.prompt(question.question)], [question.image], "right")
            if inputs["input_ids"][0].tolist() != row.tolist():
                raise ValueError(
                    f"trainer and export tokenise {question.question!r} differently; "
                    "export again with the tokenizer that the shards were built with"
                )
            theirs = model.model(**inputs).logits[0].float().cpu()
            largest = max(largest, (theirs - logits).abs().max().item())
        trained = trainer.answers(questions)
    exported = model.answers(questions)
    same = sum(a == b for a, b in zip(trained, exported, strict=True))
    return {
        "max_abs_logit_diff": largest,
        "same_greedy_answers": same == len(questions),
        "same_answers": same,
        "compared_questions": len(questions),
    }


def some_of_each(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions, as many of each kind as there are, the same ones every time."""
    order = list(range(len(questions)))
    random.Random(0).shuffle(order)
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for number in order:
        kind = questions[number].kind
        ranked.append((seen.get(kind, 0), len(ranked), number))
        seen[kind] = seen.get(kind, 0) + 1
    return [questions[number] for _, _, number in sorted(ranked)[:count]]


def evaluate(
    export: Path,
    questions: Path,
    pairs: Path | None = None,
    trainer: Path | None = None,
    tiling: bool = True,
    batch: int = 50,
) -> dict[str, Any]:
    """Everything asked for, as one dictionary; ValueError or OSError for what cannot be read."""
    asked = read_questions(questions)
    model = ExportedModel(export)
    if not tiling:
        model.without_tiling()
    result: dict[str, Any] = {"export": str(export), "tiling": tiling, "questions": str(questions)}
    result.update(score_questions(model, asked, batch))
    if pairs is not None:
        result["pairs"] = score_pairs(model, read_pairs(pairs))
    if trainer is not None:
        result["trainer"] = compare_with_trainer(
            model, some_of_each(asked, COMPARED_QUESTIONS), trainer
        )
    return result


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ARGUMENTS)
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; usage: {USAGE}")
    if ours.get("run"):
        stage = ours.get("stage", LAST_STAGE)
        split = ours.get("split", "held_out")
        directory = Path(ours.get("runs_dir", "runs")) / ours["run"]
        sets = Path(ours.get("sets", evaluation_sets(directory)))
        ours.setdefault("export", str(export_directory(directory, stage)))
        ours.setdefault("questions", str(sets / f"{split}.parquet"))
        ours.setdefault("pairs", str(sets / f"{split}_pairs.parquet"))
        ours.setdefault("trainer", str(directory / stage))
        ours.setdefault("out", str(directory / stage / "evaluation" / f"{split}.json"))
    export = required(ours, "export", USAGE)
    questions, out = required(ours, "questions", USAGE), required(ours, "out", USAGE)
    tiling = ours.get("tiling", "true").lower()
    if tiling not in ("true", "false"):
        raise ValueError(f"tiling={tiling} is neither true nor false")
    if not ours.get("batch", "50").isdigit() or int(ours.get("batch", "50")) < 1:
        raise ValueError(f"batch={ours['batch']} is not a number of questions")
    result = evaluate(
        export,
        questions,
        Path(ours["pairs"]) if ours.get("pairs") else None,
        Path(ours["trainer"]) if ours.get("trainer") and tiling == "true" else None,
        tiling == "true",
        int(ours.get("batch", "50")),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(summary(result))
    print(f"written to {out}")


def summary(result: dict[str, Any]) -> str:
    """The figures of a result in a few lines."""
    match = result["exact_match"]
    kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in match["kind"].items())
    lines = [f"exact match {match['all']:.3f} of {match['count']} questions ({kinds})"]
    lines.append("chance {majority:.3f} by the commonest answer".format(**result["chance"]))
    for kind, rate in result.get("pairs", {}).get("rate", {}).items():
        lines.append(f"prefers the chosen answer in {rate:.3f} of {kind} pairs")
    if "trainer" in result:
        lines.append(
            "against the trainer: logits differ by at most {max_abs_logit_diff:.2e}, "
            "{same_answers} of {compared_questions} answers are the same".format(
                **result["trainer"]
            )
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
