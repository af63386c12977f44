"""The page: what the template needs, taken from the run directory."""

import math
import os
import random
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from models.anyres import AnyresGeometry
from tools.hf_answers import open_image
from tools.questions import Question, read_questions
from tools.report import STAGES, read_metrics, read_optional, stage_config
from tools.report_charts import COLOURS, Line, bar_chart, line_chart, smooth
from tools.report_pictures import data_url, tiles_drawing
from tools.report_speed import figures, split

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NAMES = {
    "stage1": "Stage 1, alignment",
    "stage2": "Stage 2, instruction",
    "stage3": "Stage 3, preference",
}
SHORT = {"stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3", "no_tiling": "no tiling"}
KINDS = {
    "read": "read out",
    "count": "count",
    "end": "first, last",
    "bg": "background",
    "sum": "sum of two",
}
PAIRS = {
    "pt_pt_rate": "pt-PT over pt-BR",
    "style_unseen_rate": "the same, other wordings",
    "truth_rate": "right over invented",
}
EXAMPLES = 20


def render(directory: Path, report: dict[str, Any]) -> str:
    """The HTML of a run's report."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    held_out = read_optional(directory / "evaluation" / "held_out.json")
    return template.render(
        report=report,
        names=NAMES,
        short=SHORT,
        curves={stage: curves(directory / stage, stage) for stage in report["stages"]},
        charts=score_charts(report),
        examples=examples(held_out),
        tiles=tiles(directory, held_out),
        speeds={
            stage: {"figures": figures(fact["speed"]), "split": split(fact["speed"])}
            for stage, fact in report["stages"].items()
            if fact["speed"]
        },
        timings=timings(report["seconds"]),
        data_card=data_card(directory),
    )


def data_card(directory: Path) -> str:
    """Where the card of the run's data sets is, from the report's own place; "" if nowhere."""
    for stage in STAGES:
        config = stage_config(directory / stage)
        if config is not None and (card := Path(config.data.root) / "card.html").is_file():
            return quote(os.path.relpath(card, directory))
    return ""


def curves(stage_directory: Path, stage: str) -> list[Markup]:
    """Charts of one stage, from its metrics."""
    records = read_metrics(stage_directory)
    steps = [record["step"] for record in records]

    def lines(name: str, colour: str, label: str = "") -> list[Line]:
        ys = [record.get(name, math.nan) for record in records]
        return [Line("", steps, ys, colour, faint=True), Line(label, steps, smooth(ys), colour)]

    ln2 = (math.log(2), "ln 2")
    if stage == "stage3":
        rewards = lines("chosen_reward", COLOURS[2], "chosen")
        rewards += lines("rejected_reward", COLOURS[1], "rejected")
        accuracy = lines("accuracy", COLOURS[3])
        return [
            line_chart(lines("loss", COLOURS[0]), title="DPO loss", reference=ln2, zero=True),
            line_chart(rewards, title="Implicit rewards", zero=True),
            line_chart(accuracy, title="Pairs ranked right", zero=True),
        ]
    return [
        line_chart(lines("loss", COLOURS[0]), title="Loss a target token", zero=True),
        line_chart(lines("grad_norm", COLOURS[4]), title="Gradient norm", zero=True),
        line_chart(
            [Line("", steps, [record["lr"] for record in records], COLOURS[3])],
            title="Highest learning rate",
            zero=True,
        ),
    ]


def score_charts(report: dict[str, Any]) -> list[Markup]:
    """Exact match by kind and by layout, and the preference rates, a bar a stage."""
    found = []
    held_out = report.get("held_out", {})
    for group, title, names in (
        ("by_kind", "Exact match by kind of question", KINDS),
        ("by_layout", "Exact match by layout of the picture", {}),
    ):
        by_stage = held_out.get(group, {})
        members = list(dict.fromkeys(name for shares in by_stage.values() for name in shares))
        order = [name for name in names if name in members]
        order += [name for name in members if name not in names]
        groups = {
            names.get(member, member): {
                SHORT[stage]: shares[member] for stage, shares in by_stage.items()
            }
            for member in order
        }
        if groups:
            found.append(bar_chart(groups, title=title, width=645, height=250))
    rates = {
        PAIRS.get(name, name.removesuffix("_rate").replace("_", " ")): {
            SHORT[s]: rate for s, rate in shares.items()
        }
        for name, shares in report.get("preference", {}).items()
        if shares
    }
    if rates:
        found.append(bar_chart(rates, title="Chosen answer preferred", width=645, height=250))
    return found


def examples(held_out: dict[str, Any]) -> list[dict[str, Any]]:
    """Some questions, every kind and many layouts, with the answer after each stage."""
    stages = [stage for stage in STAGES if stage in held_out]
    questions = _questions(held_out)
    if not questions:
        return []
    order = list(range(len(questions)))
    random.Random(1).shuffle(order)
    chosen: list[int] = []
    seen: dict[str, int] = {}
    for number in order:
        key = questions[number].kind
        if seen.get(key, 0) < math.ceil(EXAMPLES / len({q.kind for q in questions})):
            seen[key] = seen.get(key, 0) + 1
            chosen.append(number)
    chosen.sort(
        key=lambda n: (
            list(KINDS).index(questions[n].kind) if questions[n].kind in KINDS else len(KINDS),
            n,
        )
    )
    found = []
    for number in chosen[:EXAMPLES]:
        question = questions[number]
        answers = [
            {
                "stage": SHORT[stage],
                "text": held_out[stage]["answers"][number],
                "right": held_out[stage]["answers"][number] == question.answer.strip(),
            }
            for stage in stages
        ]
        picture = open_image(question.image)
        found.append(
            {
                "url": data_url(picture),
                "width": picture.width,
                "height": picture.height,
                "question": question.question,
                "answer": question.answer,
                "kind": KINDS.get(question.kind, question.kind),
                "answers": answers,
            }
        )
    return found


def _questions(held_out: dict[str, Any]) -> list[Question]:
    """The question file that the scores were made with, if it is still there."""
    for stage in STAGES:
        path = Path(held_out.get(stage, {}).get("questions", ""))
        if path.is_file():
            questions = read_questions(path)
            if len(questions) == len(held_out[stage]["answers"]):
                return questions
    return []


def tiles(directory: Path, held_out: dict[str, Any]) -> list[Markup]:
    """How pictures of unlike shapes are tiled, drawn."""
    from pipeline.handoff import read_done
    from tools.hf_export import model_of

    imported = directory / "import"
    questions = _questions(held_out)
    if not questions or not (imported / "DONE.json").is_file():
        return []
    geometry = AnyresGeometry.from_model(model_of(read_done(imported), imported))
    pictures = [open_image(question.image) for question in questions]
    shapes: dict[tuple[int, int], int] = {}
    for number, picture in enumerate(pictures):
        grid = geometry.tile_grid(picture.height, picture.width)
        height, width, _, _ = geometry.resize_box(picture.height, picture.width)
        side = geometry.tile
        padded = (height, width) != (grid[0] * side, grid[1] * side)
        if grid not in shapes and (padded or number > len(pictures) // 2):
            shapes[grid] = number
    wide_to_tall = sorted(shapes, key=lambda grid: (grid[0] / grid[1], grid[0]))
    return [tiles_drawing(pictures[shapes[grid]], geometry) for grid in wide_to_tall[:6]]


def timings(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of the timing table: name, seconds, share of the longest."""
    rows = {name: value for name, value in seconds.items() if name != "all"}
    longest = max(rows.values(), default=1.0) or 1.0
    return [
        {"name": name, "seconds": value, "share": value / longest} for name, value in rows.items()
    ]
