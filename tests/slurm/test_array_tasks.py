"""What the items of each task are."""

import json
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.array_tasks import Asked, items_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = compose([f"runs_dir={tmp_path / 'runs'}", "run=r", f"data.root={tmp_path / 'data'}"])
    config.cluster.executor = "slurm"
    return config


def test_items_of_shards(config: Config, tmp_path: Path) -> None:
    asked = Asked(("run=r", "data=demo"), {"only": "[captions,vqa]", "parts": "2"})
    run = tmp_path / "runs" / "r"
    items = items_of("shards", config, asked, run)
    labels = [
        f"{name}.{phase}.{part:03d}-of-2"
        for phase in ("examine", "write")
        for name in ("captions", "vqa")
        for part in range(2)
    ]
    assert [one.name for one in items] == labels
    build = ("data_shards.build", "run=r", "data=demo")
    assert items[3].words == (
        *build, "only=[vqa]", "phase=examine", "source=vqa", "part=1/2"
    )  # fmt: skip
    assert items[7].words == (
        *build, "only=[captions,vqa]", "phase=write", "source=vqa", "part=1/2"
    )  # fmt: skip
    source = run / "raw" / "vqa" / "0.parquet"
    source.parent.mkdir(parents=True)
    with open(source, "wb") as file:
        file.truncate(9 << 30)
    config.data.sources["vqa"].input = str(source.parent / "*.parquet")
    again = items_of("shards", config, asked, run)
    same = [a.stamp == b.stamp for a, b in zip(items, again, strict=True)]
    assert same == [True, True, False, False, True, True, False, False]
    by_size = items_of("shards", config, Asked((), {"only": "[captions,vqa]"}), run)
    assert [one.name for one in by_size if ".write." in one.name] == [
        "captions.write.000-of-1", *(f"vqa.write.{part:03d}-of-3" for part in range(3))
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="only= names nothing"):
        items_of("shards", config, Asked((), {"only": "nothing"}), tmp_path)


def test_items_of_validate(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "captions"
    (folder / "shards").mkdir(parents=True)
    names = [f"captions-{number // 3:05d}-{number % 3:04d}.tar" for number in range(5)]
    for number, name in enumerate(names):
        (folder / "shards" / name).write_bytes(b"x" * number)
    asked = Asked(("run=r",), {"shards_per_item": "2"})
    run = tmp_path / "runs" / "r"
    without = items_of("validate", config, asked, run)
    info = {"shards_root": "shards", "shards": [{"name": name} for name in names]}
    (folder / "index").mkdir()
    (folder / "index" / "index.json").write_text(json.dumps({"info": info}))
    items = items_of("validate", config, asked, run)
    assert items == without
    labels = ["captions.000000-000001", "captions.000002-000003", "captions.000004-end"]
    assert [one.name for one in items] == labels
    assert [one.words[3] for one in items] == ["shards=0..1", "shards=2..3", "shards=4.."]
    assert items[0].accepted == (0, 1)
    (folder / "shards" / names[3]).unlink()
    changed = items_of("validate", config, asked, run)
    assert [one.name for one in changed] == labels
    assert [a.stamp == b.stamp for a, b in zip(items, changed, strict=True)] == [True, False, True]
    with pytest.raises(ConfigError, match="build the shards first"):
        items_of("validate", config, Asked((), {"only": "vqa"}), run)
    with pytest.raises(ConfigError, match="not a positive whole number"):
        items_of("validate", config, Asked((), {"shards_per_item": "0"}), run)


def test_items_of_reference(tmp_path: Path) -> None:
    config = compose([f"runs_dir={tmp_path}", "run=r", "stage=stage3"])
    run = tmp_path / "r"
    with pytest.raises(ConfigError, match="end the stage before stage3 first"):
        items_of("reference", config, Asked(), run)
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "DONE.json").write_text("{}")
    items = items_of("reference", config, Asked((), {"parts": "3"}), run)
    assert [one.words[-2:] for one in items] == [("--part", str(part)) for part in range(3)]
    path = Path(items[0].words[2])
    assert path.is_file() and path.parent == run / "arrays" / "reference"
    config.cluster.hours = 3.0
    assert items_of("reference", config, Asked((), {"parts": "3"}), run) == items
    config.stage.preference.beta = 0.5
    other = items_of("reference", config, Asked((), {"parts": "3"}), run)
    assert other[0].words[2] != items[0].words[2]
    with pytest.raises(ConfigError, match="a reference pass is for dpo"):
        items_of("reference", compose(["stage=stage1"]), Asked(), run)


def test_items_of_evaluate(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    sets = run / "raw" / "evaluation"
    sets.mkdir(parents=True)
    for name in ("dev", "dev_pairs", "held_out"):
        (sets / f"{name}.parquet").touch()
    with pytest.raises(ConfigError, match="has no export"):
        items_of("evaluate", config, Asked(), run)
    for folder in (run / "hf", run / "stage1" / "hf", tmp_path / "base"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    items = items_of("evaluate", config, Asked(), run)
    names = ["stage1.dev", "stage1.held_out", "stage3.dev", "stage3.held_out"]
    assert [one.name for one in items] == names
    assert items[0].words[-2:] == ("stage=stage1", "split=dev")
    assert items[1].words[-1].startswith("out=")  # it has no pairs
    (run / "hf" / "model.safetensors").write_bytes(b"new weights")
    changed = items_of("evaluate", config, Asked(), run)
    assert [a.stamp == b.stamp for a, b in zip(items, changed, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    named = Asked((), {"exports": f"[{tmp_path / 'base'}]", "questions": str(sets / "dev.parquet")})
    [one] = items_of("evaluate", config, named, run)
    assert f"pairs={sets / 'dev_pairs.parquet'}" in one.words
    with pytest.raises(ConfigError, match="gone does not exist"):
        items_of("evaluate", config, Asked((), {"exports": str(tmp_path / "gone")}), run)


def test_items_of_commands(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "file"
    asked = Asked((), {"file": str(file)})
    file.write_text("# names and words\na this\n\nb json.tool 'a b'  # why\n")
    items = items_of("commands", config, asked, tmp_path)
    assert [(one.name, one.words) for one in items] == [
        ("a", ("this",)),
        ("b", ("json.tool", "a b")),
    ]
    for text, cause in (
        ("a this\na that\n", "two items of commands are named a"),
        ("a\n", "a has no command"),
        ("", "it is empty"),
        ("a 'this\n", "cannot be read as lines of words"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=cause):
            items_of("commands", config, asked, tmp_path)
    with pytest.raises(ConfigError, match="needs file="):
        items_of("commands", config, Asked(), tmp_path)
