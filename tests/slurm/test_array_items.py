"""Items, their markers, and the record of a wave."""

from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from slurm.array_items import TaskFolder, read_wave
from slurm.array_waves import (
    moved,
    tried_too_often,
)
from tests.slurm.array_toys import item, wave_of


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder.of(tmp_path / "run", "commands")


def test_marker_holds_only_for_the_same_work(folder: TaskFolder, tmp_path: Path) -> None:
    made = tmp_path / "made"
    one = item("a", "module", "x=1", stamp="s1", result=str(made))
    wave = wave_of((one,))
    assert folder.missing([one]) == [one]
    folder.begin(one, wave)
    assert folder.tries(one, 1) == 1 and folder.tries(one, 2) == 0
    assert folder.end(one, wave, 0, {"seconds": 1.0})
    assert folder.missing([one]) == [one]  # its result is not there
    made.touch()
    assert folder.missing([one]) == []
    assert folder.tries(one, 1) == 0
    for other in (
        item("a", "module", "x=2", stamp="s1"),
        item("a", "module", "x=1", stamp="s2"),
        item("b", "module", "x=1", stamp="s1"),
    ):
        assert folder.missing([other]) == [other]
    (folder.root / "done" / "a.json").write_text('{"format": 1, "it')
    assert folder.missing([one]) == [one]


def test_failure_is_kept_until_success(folder: TaskFolder) -> None:
    one = item("a", accepted=(0, 1))
    wave = wave_of((one,))
    folder.begin(one, wave)
    assert not folder.end(one, wave, 2, {"said": "no"})
    assert folder.record("failed", "a")["said"] == "no"
    assert folder.end(one, wave, 1, {})  # a result for this item
    assert folder.record("failed", "a") == {} and folder.record("begun", "a") == {}


def test_tries_are_counted_once_a_wave_and_per_submission(folder: TaskFolder) -> None:
    one, two = item("a"), item("b")
    first, second = (
        wave_of((one, two), number=4, submission=4),
        wave_of((one,), number=5, submission=4),
    )
    folder.begin(one, first)
    folder.begin(one, first)  # requeued
    folder.begin(two, first)
    assert tried_too_often(folder, [one, two], 4) == []
    folder.begin(one, second)
    assert tried_too_often(folder, [one, two], 4) == ["a"]
    assert tried_too_often(folder, [one, two], 6) == []  # the command was given again


def test_wave_moved(folder: TaskFolder) -> None:
    one, two = item("a"), item("b")
    wave = wave_of((one,), (two,), number=2, submission=1)
    assert not moved(folder, wave)
    folder.begin(two, wave_of((two,), number=1, submission=1))
    assert not moved(folder, wave)  # that was the wave before
    folder.begin(two, wave)
    assert moved(folder, wave)


def test_wave_survives_its_file(folder: TaskFolder) -> None:
    one = item("a", "m", "k=v", stamp="s", accepted=(0, 1), result="r", shell="srun x")
    wave = wave_of((one, item("b")), (item("c"),))
    directory = folder.wave(1)
    directory.mkdir(parents=True)
    wave.write(directory)
    assert read_wave(directory) == wave
    assert folder.waves() == [1] and folder.next_number() == 2
    for damage in ("{", "[]", '{"format": 9}', '{"format": 1}'):
        (directory / "items.json").write_text(damage)
        with pytest.raises(ConfigError, match="items.json is damaged"):
            read_wave(directory)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a b", "a" * 200])
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an item"):
        item(name)
