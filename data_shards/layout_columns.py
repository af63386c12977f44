"""Which column holds what: from the names that data sets use, or as data.sources.NAME.columns says.

Names looked for, and where they come from (dataset cards on huggingface.co):
- messages: the OpenAI chat format; NVIDIA's Nemotron-VLM-Dataset-v2 (data_format.md); TRL.
- conversations: LLaVA (docs/Finetune_Custom_Data.md), lmms-lab/LLaVA-NeXT-Data,
  nvidia/Llama-Nemotron-VLM-Dataset-v1.
- texts, images: HuggingFaceM4/FineVision.
- image, caption: Spawning/PD12M; img2dataset writes the caption as a member `txt`.
- image, question, chosen, rejected: OpenGVLab/MMPR-v1.2. prompt, chosen, rejected: TRL.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.schema.data import SourceConfig

CHATS = ("texts", "conversations", "messages")  # layouts whose rows hold a list of turns
# Our field -> their names, the first that is there is taken.
_NAMES: dict[str, tuple[str, ...]] = {
    "images": ("images", "image"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "question": ("question", "prompt"),
    "answer": ("answer", "completion"),
    "caption": ("caption", "txt"),
    "licence": ("licence", "license"),
}
_TURNS: dict[str, tuple[str, ...]] = {  # the field `messages`, by layout
    "texts": ("texts",),
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
}
_OPTIONAL = ("images", "licence")


class LayoutError(ValueError):
    """Columns that no layout fits; the message says which there are, without naming a file."""


@dataclass(frozen=True)
class Rules:
    """How a source says its rows are to be read.

    Attributes:
        layout: one of conf.schema.data.LAYOUTS.
        columns: our field -> their column, for fields named otherwise.
        prompts: questions for captions.
        preference: rows carry a chosen and a rejected answer.
    """

    layout: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    preference: bool = False

    @classmethod
    def of(cls, source: SourceConfig) -> "Rules":
        """The rules of a configured source."""
        return cls(source.layout, source.columns, tuple(source.prompts), source.preference)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Rules":
        """The inverse of `to_json`."""
        return cls(
            str(value["layout"]),
            value["columns"],
            tuple(value["prompts"]),
            bool(value["preference"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {
            "layout": self.layout,
            "columns": dict(self.columns),
            "prompts": list(self.prompts),
            "preference": self.preference,
        }


@dataclass(frozen=True)
class Columns:
    """What was found: the layout, and our field -> their column (a dot reaches into a struct)."""

    layout: str
    of: Mapping[str, str]

    def value(self, record: Mapping[str, Any], ours: str) -> Any:
        """Our field `ours` of a row, None where the row lacks it."""
        name = self.of.get(ours)
        return None if name is None else look_up(record, name)


def look_up(record: Any, name: str) -> Any:
    """`record[name]`; where there is no such key, each dot reaches into a mapping."""
    if isinstance(record, Mapping):
        if name in record:
            return record[name]
        first, dot, rest = name.partition(".")
        if dot and first in record:
            return look_up(record[first], rest)
    return None


def candidates(rules: Rules) -> set[str]:
    """Every column that a row could be read from."""
    usual = {name for names in (*_NAMES.values(), *_TURNS.values()) for name in names}
    return usual | set(rules.columns.values())


def find(names: Collection[str], rules: Rules, whole: bool = True, beside: bool = False) -> Columns:
    """The layout of rows with these columns, and which column is which.

    Args:
        whole: `names` are the columns of a whole file. A JSON object may do without those that are
            not needed.
        beside: images come beside the row, not in a column.

    Raises:
        LayoutError: no layout fits, or a column that was named is missing.
    """
    missing = sorted(
        name
        for ours, name in rules.columns.items()
        if not _has(names, name) and (whole or ours not in _OPTIONAL)
    )
    if missing:
        raise LayoutError(f"no column {', '.join(missing)} (there are {_listed(names)})")
    of = {}
    for ours, usual in _NAMES.items():
        name = _first(names, (rules.columns[ours],) if ours in rules.columns else usual)
        if name is not None:
            of[ours] = name
    layouts = _order(rules) if rules.layout == "auto" else [rules.layout]
    for layout in layouts:
        found = dict(of)
        if layout in CHATS:
            mapped = rules.columns.get("messages")
            name = _first(names, (mapped,) if mapped is not None else _TURNS[layout])
            if name is None:
                continue
            found["messages"] = name
        if _fits(layout, found, rules, beside):
            return Columns(layout, found)
    wanted = "no layout fits" if rules.layout == "auto" else f"layout {rules.layout} does not fit"
    answers = ""
    if rules.preference:
        answers = "; a pair also needs chosen and rejected"
    elif {"chosen", "rejected"} <= set(of):
        answers = " (these are preference pairs: set preference=true)"
    elif "caption" in of and not rules.prompts:
        answers = " (captions need prompts, the questions asked)"
    raise LayoutError(
        f"{wanted} the columns {_listed(names)}{answers}: name them in data.sources.NAME.columns"
    )


def _order(rules: Rules) -> list[str]:
    """Layouts to try. Columns that were named speak for the layouts that have them."""
    if "messages" in rules.columns:
        return ["messages"]  # which of the three, its turns tell
    if {"question", "answer"} & set(rules.columns):
        return ["question"]
    if "caption" in rules.columns:
        return ["caption"]
    return [*CHATS, "question", "caption"]


def _fits(layout: str, found: Mapping[str, str], rules: Rules, beside: bool) -> bool:
    if rules.preference and not {"chosen", "rejected"} <= set(found):
        return False
    if layout in CHATS:
        return True
    if layout == "caption":
        return "caption" in found and ("images" in found or beside) and bool(rules.prompts)
    # Without a question, the conversations of a pair share it.
    return rules.preference or {"question", "answer"} <= set(found)


def _first(names: Collection[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in wanted if _has(names, name)), None)


def _has(names: Collection[str], name: str) -> bool:
    return name in names or name.partition(".")[0] in names


def _listed(names: Collection[str]) -> str:
    shown = sorted(str(name)[:60] for name in names)
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "") or "none"
