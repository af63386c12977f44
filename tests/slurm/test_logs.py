"""The log that is meant, its end, and following it into the next segment."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from slurm import logs as module
from slurm.logs import find, follow, main, tail
from tests.slurm.programs_on_path import Programs
from tests.slurm.test_cancel import squeue_row
from tests.slurm.watched_run import WatchedRun


@pytest.fixture
def run(tmp_path: Path) -> WatchedRun:
    run = WatchedRun(tmp_path / "runs")
    run.plan("stage1", "stage2", cluster="local")
    return run


def test_the_newest_log_or_the_one_that_is_named(run: WatchedRun) -> None:
    assert find(run.root) is None
    first, second = run.log("stage1", 1, "one\n"), run.log("stage1", 2, "two\n")
    assert find(run.root) == second
    assert find(run.root, "stage1", 1) == first and find(run.root, segment=1) == first
    time.sleep(0.02)
    later = run.log("stage2", 1, "three\n")
    os.utime(second)  # something is still written when the next stage has begun
    assert find(run.root) == later and find(run.root, "stage1") == second
    with pytest.raises(ConfigError, match="stage1 has segments 001, 002"):
        find(run.root, "stage1", 7)


@pytest.mark.parametrize(
    ("text", "lines", "wanted"),
    [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\n", 50, "a\n"),
        ("", 5, ""),
        ("a\nb\n", 0, ""),
        ("x" * 200_000 + "\nlast\n", 1, "last\n"),
        ("é\n" * 90_000, 70_000, "é\n" * 70_000),
    ],
)
def test_tail(tmp_path: Path, text: str, lines: int, wanted: str) -> None:
    log, out = tmp_path / "log.out", io.BytesIO()
    log.write_text(text, encoding="utf-8")
    assert tail(log, lines, out) == len(text.encode())
    assert out.getvalue().decode() == wanted


def test_following_goes_on_with_the_next_segment_and_ends_with_the_stage(
    run: WatchedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    log = run.log("stage1", 1, "before\n")
    out = io.BytesIO()
    said: list[str] = []
    size = log.stat().st_size
    over = lambda: pytest.fail("Slurm was asked")  # noqa: E731
    thread = threading.Thread(target=follow, args=(log, size, out, over, said.append))
    thread.start()

    def wait(text: str) -> None:
        end = time.monotonic() + 10
        while text.encode() not in out.getvalue():
            assert time.monotonic() < end, out.getvalue()
            time.sleep(0.01)

    run.log("stage1", 1, "more\n")
    wait("more")
    second = run.log("stage1", 2, "second\n")
    wait("second")
    run.log("stage1", 2, "its end\n")
    run.done("stage1", 3)
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert out.getvalue() == b"more\nsecond\nits end\n"
    assert said == [f"==> {second} <==", "stage1 is done"]


def test_following_a_stage_that_fails(run: WatchedRun) -> None:
    log = run.log("stage1", 1, "x\n")
    (run.root / "stage1" / "FAILED.json").write_text(json.dumps({"reason": "no disk"}))
    out = io.BytesIO()
    said: list[str] = []
    follow(log, 0, out, lambda: False, said.append)
    assert out.getvalue() == b"x\n" and said == ["stage1 failed: no disk"]


def test_silence_is_looked_into(run: WatchedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    monkeypatch.setattr(module, "SILENT", 0.05)
    asked = []

    def over() -> bool:
        asked.append(1)
        return len(asked) == 2

    out = io.BytesIO()
    said: list[str] = []
    follow(run.log("stage1", 1, ""), 0, out, over, said.append)
    assert len(asked) == 2 and said == ["nothing of stage1 runs or is queued any more"]


def test_what_is_left_to_follow(
    run: WatchedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(tmp_path / "bin", monkeypatch, alone=True)
    run.plan("stage1", cluster="mn5")
    run.record("stage1.001", "11")
    run.record("stage1.002", "12")
    run.attempt("stage1", 1, "stopped", job_id="11")
    programs.answers("squeue", out=squeue_row("12", "stage1.002", "PENDING"))
    assert not module._is_over(run.root, "stage1")
    programs.answers("squeue")
    (run.root / ".status.json").unlink()
    assert module._is_over(run.root, "stage1")
    programs.answers("squeue", said="Unable to contact slurm controller", code=1)
    (run.root / ".status.json").unlink()
    assert not module._is_over(run.root, "stage1"), "who does not know waits on"


def test_nothing_has_begun(
    run: WatchedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs = Programs(tmp_path / "bin", monkeypatch, alone=True)
    run.record("stage1.001", "11")
    programs.answers("squeue", out=squeue_row("11", "stage1.001", "PENDING"))
    assert main(run.words) == 0
    told = capsys.readouterr().out
    assert "there is no log yet" in told and "stage1 segment 1" in told and "PENDING" in told


def test_command_line(run: WatchedRun, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    log = run.log("stage1", 1, "".join(f"{n}\n" for n in range(80)))
    assert main([*run.words, "lines=2"]) == 0
    told = capfdbinary.readouterr()
    assert told.out == b"78\n79\n" and str(log).encode() in told.err
    assert main(run.words) == 0
    assert len(capfdbinary.readouterr().out.splitlines()) == 50
    for words, wanted in (
        (["stage=stage9"], b"has no stage9"),
        (["lines=few"], b"lines=few is not a whole number"),
        (["segment=5"], b"has segments 001"),
        (["tail"], b"as KEY=VALUE"),
    ):
        assert main([*run.words, *words]) == 1
        assert wanted in capfdbinary.readouterr().err


def test_interrupted_and_piped(run: WatchedRun) -> None:
    run.log("stage1", 1, "x\n" * 1000)
    words = [sys.executable, "-m", "slurm.logs", *run.words]
    process = subprocess.Popen(
        [*words, "follow=true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(2)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert process.returncode == 130 and b"Traceback" not in told
    piped = subprocess.run(
        ["sh", "-c", '"$@" lines=1000000 | head -n 1', "sh", *words],
        capture_output=True,
        timeout=20,
    )
    assert piped.stdout == b"x\n" and b"Traceback" not in piped.stderr
