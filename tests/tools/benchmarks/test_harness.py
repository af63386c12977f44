"""Turns, tables, and what is said of a machine that has other work."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import bench
from tools.benchmarks import machine
from tools.benchmarks.machine import OtherWork, disturbed, parse_cpu_times
from tools.benchmarks.table import Page, Section, number
from tools.benchmarks.turns import Side, SideError, Turns, spread, take_turns

Turn = Callable[[], dict[str, float]]


def _side(seconds: float, tokens: float) -> Turn:
    return lambda: {"seconds": seconds, "tokens": tokens, "when": time.monotonic()}


def _fails() -> Turn:
    raise RuntimeError("no such luck")


def _dies() -> Turn:
    return lambda: os._exit(9)


def test_sides_take_turns_in_their_own_processes() -> None:
    sides = [
        Side("a", _side, {"seconds": 2.0, "tokens": 10.0}),
        Side("b", _side, {"seconds": 1.0, "tokens": 10.0}),
    ]
    taken = take_turns(sides, turns=3, warm_up=1)
    when = [taken.reports[name][turn]["when"] for turn in range(3) for name in "ab"]
    assert when == sorted(when) and len(when) == 6
    assert taken.median("a", "tokens") == 5.0
    assert taken.ratios("b", "a", "tokens") == [2.0] * 3
    assert taken.value("a", "peak_rss_gb") > 0


def test_a_side_that_fails_or_dies_is_named() -> None:
    with pytest.raises(SideError, match="(?s)b: .*no such luck"):
        take_turns([Side("a", _side, {"seconds": 1.0, "tokens": 1.0}), Side("b", _fails)], 1)
    with pytest.raises(SideError, match="c ended with status 9"):
        take_turns([Side("c", _dies)], 1)


def test_ratios_are_of_turns_that_belong_together() -> None:
    # A machine that grows slower: the medians' ratio would be the same, the spread would not.
    reports = {
        "a": [{"seconds": s, "tokens": 100.0} for s in (1.0, 2.0, 4.0)],
        "b": [{"seconds": s, "tokens": 150.0} for s in (1.0, 2.0, 4.0)],
    }
    taken = Turns(reports, others=0.0)
    assert taken.ratios("b", "a", "tokens") == [1.5] * 3
    assert spread([1.0, 3.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_other_work_is_what_the_processors_did_beside_us(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([(100.0, 1000.0), (104.0, 1010.0)])
    monkeypatch.setattr(OtherWork, "_now", staticmethod(lambda: next(moments)))
    work = OtherWork()
    work.start(50.0)
    assert work.stop(51.0) == pytest.approx(0.3)  # 4 of 10 s in use, 1 of them ours


def test_stolen_time_is_in_use() -> None:
    stat = "cpu  100 0 50 800 50 0 0 25 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    used, whole = parse_cpu_times(stat)
    tick = os.sysconf("SC_CLK_TCK")
    assert used * tick == pytest.approx(175) and whole * tick == pytest.approx(1025)


def test_a_disturbed_measurement_is_not_to_be_quoted() -> None:
    assert disturbed(0.05) == ""
    assert "Not to be quoted" in disturbed(0.4) and "40 %" in disturbed(0.4)
    assert "Not known" in disturbed(None)


def _section(title: str, rows: list) -> Section:
    facts = machine.facts(["python", "-m", "tools.bench"])
    return Section(title, "How.", ["a", "b"], rows, facts, notes=["a note"], settings={"turns": 2})


def test_a_section_replaces_its_old_one_only(tmp_path: Path) -> None:
    page = Page(tmp_path / "docs", "speed", "# Speed", ["one", "two"])
    page.write({"two": _section("Second", [["x", 1234.5]])})
    page.write({"one": _section("First", [["y", 0.5]])})
    page.write({"two": _section("Second", [["z", 2]])})
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert text.index("# Speed") < text.index("## First") < text.index("## Second")
    assert "| z | 2 |" in text and "| x |" not in text and "| y | 0.5 |" in text
    assert "commit" in text and "torch" in text and "`python -m tools.bench`" in text
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["speed.json", "speed.md"]
    page.json_path.write_text("{")
    with pytest.raises(ValueError, match="speed.json is damaged.*measure again"):
        page.write({})


def test_numbers_have_three_digits() -> None:
    values = [None, "a", 0, 0.0, 12345.6, 123, 1.23456, 0.000123]
    assert [number(v) for v in values] == ["", "a", "0", "0", "12 346", "123", "1.23", "1.2e-04"]


@pytest.mark.parametrize(
    "words, wrong",
    [
        (["only=stage9"], "only=stage9 is none of"),
        (["turns=0"], "at least 1"),
        (["steps=few"], "take numbers"),
        (["coffee=1"], "unknown argument"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(words: list[str], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        bench.main(words)


def test_the_command_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(machine.REPOSITORY / "tools" / "bench.py"), "turns=2"])
    assert machine.facts()["command"] == "python -m tools.bench turns=2"
