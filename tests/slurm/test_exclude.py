"""Nodes that later jobs avoid."""

from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from slurm import exclude


def test_add_tells_what_is_new(tmp_path: Path) -> None:
    assert exclude.read(tmp_path) == []
    assert exclude.add(tmp_path, {"acc2": "no GPU\nat all", "acc10": "slow"}, "17") == [
        "acc10",
        "acc2",
    ]
    assert exclude.add(tmp_path, {"acc2": "again"}, "18") == []
    assert exclude.add(tmp_path, {}) == []
    assert exclude.read(tmp_path) == ["acc10", "acc2"]
    entry = exclude.entries(tmp_path)["acc2"]
    assert (entry["reason"], entry["job"]) == ("no GPU at all", "17")
    assert entry["time"] > 1.7e9


def test_a_name_that_would_be_an_option_is_refused(tmp_path: Path) -> None:
    for name in ("--all", "a,b", "a b", "", "a\nb"):
        with pytest.raises(ConfigError, match="no name of a node"):
            exclude.add(tmp_path, {name: "bad"})
    assert exclude.read(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"acc1": 3}', '{"--x": {}}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / exclude.EXCLUDE).write_text(text)
    with pytest.raises(ConfigError, match="exclude_nodes.json is damaged"):
        exclude.read(tmp_path)
