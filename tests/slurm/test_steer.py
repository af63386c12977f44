"""Files by which a colleague acts on a run."""

import pytest

from slurm.steer import main
from tests.slurm.watched_run import WatchedRun


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    run = WatchedRun(tmp_path_factory.mktemp("runs"))
    run.plan("stage1", "stage2", cluster="slurm")
    run.attempt("stage1", 1, "stopped", ago=100)
    run.attempt("stage2", 1)
    return run


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["save"], "stage2/SAVE"),
        (["exit"], "stage2/EXIT"),
        (["exit", "stage=stage1"], "stage1/EXIT"),
        (["stop"], "STOP"),
        (["stop", "stage=stage2"], "stage2/STOP"),
    ],
)
def test_a_file_is_written_and_removed(run: WatchedRun, words: list[str], path: str) -> None:
    assert main([*run.words, *words]) == 0
    assert (run.root / path).exists()
    files = [p for p in run.root.rglob("*") if p.name in ("SAVE", "EXIT", "STOP")]
    assert files == [run.root / path]
    assert main([*run.words, "go"]) == 0
    assert not (run.root / path).exists()


def test_a_stage_that_is_done_is_not_steered(
    run: WatchedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.done("stage2", 100)
    assert main([*run.words, "save"]) == 0
    assert (run.root / "stage1" / "SAVE").exists(), "the newest that is not done"
    run.done("stage1", 100)
    assert main([*run.words, "save"]) == 1
    assert "is training; name one with stage=" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pause"], ["save", "exit"], [], ["save", "stage=stage7"]])
def test_misunderstood(
    run: WatchedRun, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run.words, *words]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_go_lets_arrays_go_on_too(run: WatchedRun) -> None:
    stop = run.root / "arrays" / "evaluate" / "STOP"
    stop.parent.mkdir(parents=True)
    stop.touch()
    assert main([*run.words, "go"]) == 0
    assert not stop.exists()


def test_go_without_files(run: WatchedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*run.words, "go"]) == 0
    assert "no such file was there" in capsys.readouterr().out
