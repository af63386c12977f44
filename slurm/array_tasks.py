"""What the items of each array task are, and what one of its jobs needs.

A task is what can be done in any order, on any node: each item is a command of its own that may
be given by hand as well. Items are made from the configuration and from what lies on disk; nothing
here asks Slurm.
"""

import glob
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.compose import dump, to_mapping
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.array_items import Item, stamp
from slurm.files import write_text

SHARDS_PER_ITEM = 8
PARTS = 8  # of the reference pass: each part loads the weights once
SHARE_BYTES, MOST_SHARES = 4 << 30, 64  # of a source's files that one item of shards examines
LAST_STAGE = "stage3"
PAIRS = "_pairs"  # FILE_pairs.parquet goes with FILE.parquet
DAMAGE = 1  # exit code of data_shards.validate that is a result


@dataclass(frozen=True)
class Asked:
    """What the command line says of the items, beside the configuration.

    `overrides` are those of the configuration, less the cluster's: an item is the same item
    wherever it runs.
    """

    overrides: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)  # of OPTIONS

    def names(self, option: str) -> list[str]:
        """A list option, [a,b] or a,b."""
        value = self.options.get(option, "").strip("[]")
        return [word.strip() for word in value.split(",") if word.strip()]

    def number(self, option: str, default: int) -> int:
        """A positive whole number. Raises ConfigError."""
        value = self.options.get(option, str(default))
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{option}={value} is not a positive whole number")
        return int(value)


# Words of the command line that are no configuration, and the tasks that read them.
OPTIONS = {
    "only": ("shards", "validate"),
    "shards_per_item": ("validate",),
    "parts": ("shards", "reference"),
    "exports": ("evaluate",),
    "questions": ("evaluate",),
    "file": ("commands",),
}


@dataclass(frozen=True)
class Task:
    """One kind of array."""

    items: Callable[[Config, Asked, Path], list[Item]]  # (.., .., absolute run directory)
    gpus: int = 0  # of one process, where the nodes have GPUs
    ranks: bool = False  # its items run on the ranks of the model's layout
    stage: str = ""  # whose configuration it needs; empty: any
    hours: float = 24.0  # of an element, where the command line and the site allow more


def _shards(config: Config, asked: Asked, run: Path) -> list[Item]:
    """An item a share of a source's blocks: first those that examine them, then those that write.

    One that writes waits for, and helps with, what must be examined before it; the last one of a
    source publishes it.
    """
    names = _sources(config, asked)
    examine, write = [], []
    seen: list[Path] = []
    for number, name in enumerate(names):
        files = _source_files(config, name)
        seen = [*seen, *files] if config.data.duplicates.across_sources else files
        before = names[: number + 1] if config.data.duplicates.across_sources else [name]
        made = _exactly(Path(config.data.root) / name / "manifest.parquet")
        parts = asked.number("parts", _parts_of(files))
        for part in range(parts):
            words = (f"source={name}", f"part={part}/{parts}")
            label = f"{part:03d}-of-{parts}"
            first = ("data_shards.build", *asked.overrides, f"only=[{name}]", "phase=examine")
            examine.append(Item(f"{name}.examine.{label}", (*first, *words), stamp(files)))
            only = f"only=[{','.join(before)}]"
            second = ("data_shards.build", *asked.overrides, only, "phase=write", *words)
            write.append(Item(f"{name}.write.{label}", second, stamp(seen), result=made))
    return [*examine, *write]


def _validate(config: Config, asked: Asked, run: Path) -> list[Item]:
    """An item some shards; the last one of a source is open, for shards that are missing."""
    size = asked.number("shards_per_item", SHARDS_PER_ITEM)
    items = []
    for name in _sources(config, asked):
        folder = Path(config.data.root) / name
        if not folder.is_dir():
            if asked.names("only"):
                raise ConfigError(f"{folder} does not exist; build the shards first (make shards)")
            continue
        manifest, shards = folder / "manifest.parquet", _shard_files(folder)
        firsts = range(0, max(len(shards), 1), size)
        for first in firsts:
            last = "" if first == firsts[-1] else str(first + size - 1)
            label = f"{name}.{first:06d}-{int(last):06d}" if last else f"{name}.{first:06d}-end"
            report = run / "arrays" / "validate" / "reports" / f"{label}.json"
            words = ["data_shards.validate", *asked.overrides, f"source={name}"]
            words += [f"shards={first}..{last}", f"report={report}"]
            mine = shards[first : first + size]
            found = stamp([manifest, *mine])
            items.append(Item(label, tuple(words), found, (0, DAMAGE), _exactly(report)))
    if not items:
        raise ConfigError(f"no shards under {config.data.root}; build them first (make shards)")
    return items


def _reference(config: Config, asked: Asked, run: Path) -> list[Item]:
    """An item a part: every N-th global batch of one pass over the preference pairs."""
    stage = config.stage
    if stage.objective != "dpo":
        raise ConfigError(
            f"{stage.name} has objective {stage.objective}; a reference pass is for dpo"
        )
    before = Path(config.init_from) if config.init_from else run / f"stage{stage.number - 1}"
    done = before / "DONE.json"
    if not done.exists():
        raise ConfigError(f"{done} does not exist: end the stage before {stage.name} first")
    manifests = [
        Path(config.data.root) / name / "manifest.parquet" for name in config.data.drawn(stage.name)
    ]
    count = asked.number("parts", PARTS)
    # Named by its content: parts that are queued must not find another configuration in it.
    value = {key: part for key, part in to_mapping(config).items() if key != "cluster"}
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    path = run / "arrays" / "reference" / f"config-{digest}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, dump(config))
    words = ("pipeline.reference", "--config", str(path), "--parts", str(count), "--part")
    made = f"{glob.escape(str(run / stage.name / 'reference'))}/*.parquet"
    files = stamp([done, *manifests])
    return [
        Item(f"part{part:03d}-of-{count}", (*words, str(part)), files, result=made)
        for part in range(count)
    ]


def _evaluate(config: Config, asked: Asked, run: Path) -> list[Item]:
    """An item an export and a set of questions: the run's own, or those named."""
    exports, questions = asked.names("exports"), asked.names("questions")
    if exports or questions:
        return _named_evaluations(config, asked, run)
    items = []
    sets = run / "raw" / "evaluation"
    found = [path for path in sorted(sets.glob("*.parquet")) if not path.stem.endswith(PAIRS)]
    for stage, export in _exports(run).items():
        for path in found:
            out = run / stage / "evaluation" / f"{path.stem}.json"
            words = ["tools.evaluate", f"run={config.run}", f"runs_dir={config.runs_dir}"]
            words += [f"stage={stage}", f"split={path.stem}"]
            if not path.with_name(f"{path.stem}{PAIRS}.parquet").is_file():  # that form wants pairs
                words = ["tools.evaluate", f"export={export}", f"questions={path}", f"out={out}"]
            made = _exactly(out)
            files = stamp([*_files(export), path])
            items.append(Item(f"{stage}.{path.stem}", tuple(words), files, result=made))
    if not items:
        raise ConfigError(
            f"{run} has no export (make export) or no question sets in {sets}; name them with "
            "exports=[DIR,...] questions=[FILE,...]"
        )
    return items


def _named_evaluations(config: Config, asked: Asked, run: Path) -> list[Item]:
    exports = [Path(name) for name in asked.names("exports")] or list(_exports(run).values())
    sets = [Path(name) for name in asked.names("questions")]
    sets = sets or sorted((run / "raw" / "evaluation").glob("*.parquet"))
    sets = [path for path in sets if not path.stem.endswith(PAIRS)]
    missing = [path for path in exports if not (path / "config.json").is_file()]
    missing += [path for path in sets if not path.is_file()]
    if missing or not exports or not sets:
        what = f"{missing[0]} does not exist" if missing else f"{run} has no export or no questions"
        raise ConfigError(f"{what}; give exports=[DIR,...] questions=[FILE,...]")
    items = []
    for export in exports:
        for path in sets:
            label = f"{_label(export)}.{path.stem}"
            pairs = path.with_name(f"{path.stem}{PAIRS}{path.suffix}")
            words = ["tools.evaluate", f"export={export}", f"questions={path}"]
            out = run / "evaluation" / f"{label}.json"
            words += [f"out={out}"]
            words += [f"pairs={pairs}"] if pairs.is_file() else []
            files = stamp([*_files(export), path, pairs])
            items.append(Item(label, tuple(words), files, result=_exactly(out)))
    return items


def _commands(config: Config, asked: Asked, run: Path) -> list[Item]:
    """An item a line of `file=`: its name, then what comes after `python -m`."""
    name = asked.options.get("file")
    if not name:
        raise ConfigError("task=commands needs file=FILE, with a NAME and its words on each line")
    items = []
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        for line in lines:
            words = shlex.split(line, comments=True)
            if words:
                items.append(Item(words[0], tuple(words[1:])))
    except ValueError as error:
        raise ConfigError(f"{name} cannot be read as lines of words ({error})") from error
    idle = [item.name for item in items if not item.words]
    if idle or not items:
        raise ConfigError(f"{name}: {f'{idle[0]} has no command' if idle else 'it is empty'}")
    return items


TASKS: dict[str, Task] = {
    "shards": Task(_shards),
    "validate": Task(_validate, hours=2.0),
    "reference": Task(_reference, ranks=True, stage=LAST_STAGE, hours=4.0),
    "evaluate": Task(_evaluate, gpus=1, hours=2.0),
    "commands": Task(_commands, hours=2.0),
}


def items_of(task: str, config: Config, asked: Asked, run: Path) -> list[Item]:
    """Every item of a task, done or not.

    Raises ConfigError where the task's inputs are missing, or two items would share a name.
    """
    items = TASKS[task].items(config, asked, run)
    seen: set[str] = set()
    for item in items:
        if item.name in seen:
            raise ConfigError(f"two items of {task} are named {item.name}; rename one")
        seen.add(item.name)
    return items


def _sources(config: Config, asked: Asked) -> list[str]:
    only = asked.names("only")
    unknown = sorted(set(only) - set(config.data.sources))
    if unknown:
        raise ConfigError(
            f"only= names {', '.join(unknown)}; data.sources has {', '.join(config.data.sources)}"
        )
    return [name for name in config.data.sources if not only or name in only]


def _source_files(config: Config, name: str) -> list[Path]:
    return [Path(p) for p in sorted(glob.glob(config.data.sources[name].input, recursive=True))]


def _parts_of(files: Sequence[Path]) -> int:
    """Shares of a source, by the size of its files; the images that they only name are unknown."""
    size = sum(path.stat().st_size for path in files if path.is_file())
    return max(1, min(MOST_SHARES, -(-size // SHARE_BYTES)))


def _shard_files(folder: Path) -> list[Path]:
    """Shards in the order of the manifest, missing ones too; without a manifest, what is there."""
    try:
        info = json.loads((folder / "index" / "index.json").read_bytes())["info"]
        return [folder / info["shards_root"] / shard["name"] for shard in info["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return sorted((folder / "shards").glob("*.tar"))


def _exports(run: Path) -> dict[str, Path]:
    """Stage -> its Hugging Face folder, as tools.evaluate looks for it."""
    folders = {path.name: path / "hf" for path in sorted(run.glob("stage[0-9]"))}
    folders[LAST_STAGE] = run / "hf"
    return {stage: path for stage, path in folders.items() if (path / "config.json").is_file()}


def _files(export: Path) -> list[Path]:
    return sorted(path for path in export.iterdir() if path.is_file())


def _label(export: Path) -> str:
    """A short name: the last two parts of the path."""
    parts = export.parts[-2:]
    text = "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in p) for p in parts)
    return text.strip("._-") or "export"


def _exactly(path: Path) -> str:
    """A pattern that only this path matches."""
    return glob.escape(str(path))
