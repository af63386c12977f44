"""Cancelling a whole run: nothing starts in between, and what trains saves first."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from slurm import commands
from slurm.answers import FIELD
from slurm.cancel import cancel, main
from slurm.errors import SlurmError
from tests.slurm.programs_on_path import Programs
from tests.slurm.throwaway import ThrowAwaySlurm
from tests.slurm.watched_run import WatchedRun

# A segment as slurm.bodies writes it, less the training: ranks that save on USR2 and end with 143.
SEGMENT = """
terminated=
trap 'terminated=1' TERM USR2
touch {folder}/began
srun --ntasks=2 --nodes=2 bash -c 'trap "touch {folder}/saved; exit 143" USR2 TERM
  touch {folder}/up.$SLURM_PROCID; for i in $(seq 300); do sleep 0.2; done'
code=$?
if [ -n "$terminated" ]; then echo asked >> {folder}/asked; fi
if [ "$code" -eq 143 ]; then exit 0; fi
exit "$code"
"""


@pytest.fixture
def run(tmp_path: Path) -> WatchedRun:
    return WatchedRun(tmp_path / "runs")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch, alone=True)


def squeue_row(job_id: str, name: str, state: str, index: str = "N/A", user: str = "") -> str:
    fields = [job_id, index, state, "None", user or "root", "acc", "1795253398", "N/A", "0:00",
              "1:00:00", "2", "", "(null)", f"demo.{name}", "(null)"]  # fmt: skip
    return "\x1e" + FIELD.join(fields) + "\n"


def chain(run: WatchedRun) -> str:
    run.plan("stage1", "stage2")
    run.saved("stage1", 30, ago=120)
    for name, job_id in (("stage1.001", "11"), ("stage1.002", "12"), ("stage2.001", "21")):
        run.record(name, job_id)
    run.record("evaluate.001", "50", "array")
    return (
        squeue_row("11", "stage1.001", "RUNNING")
        + squeue_row("12", "stage1.002", "PENDING")
        + squeue_row("21", "stage2.001", "PENDING")
        + squeue_row("50", "evaluate.001", "RUNNING", "0")
        + squeue_row("50", "evaluate.001", "PENDING", "1")
    )


def test_pending_jobs_are_held_then_cancelled_and_running_segments_asked(
    run: WatchedRun, programs: Programs
) -> None:
    programs.answers("squeue", out=chain(run))
    programs.answers("scontrol")
    programs.answers("scancel")
    (run.root / ".status.json").write_text("{}")
    said = "\n".join(cancel(run.root))
    assert programs.called("scontrol") == ["hold 12,21,50"]
    assert programs.called("scancel") == [
        "--state=PENDING 12 21 50",
        "50",
        "--signal=USR2 --batch 11",
        "--signal=USR2 11",
    ]
    everything = programs.calls.read_text()
    assert everything.index("hold") < everything.index("scancel"), "held before the first is gone"
    assert len(programs.called("squeue")) == 2
    assert (run.root / "stage1" / "EXIT").exists()
    assert not (run.root / "stage2" / "EXIT").exists()
    assert "cancelled before they began: stage1.002 (12), stage2.001 (21)" in said
    assert "asked to save and end: stage1.001 (11)" in said
    assert "stage1: saved last after step 30, 2 min ago" in said
    assert not (run.root / ".status.json").exists(), "status asks anew"


def test_a_segment_whose_stage_is_done_is_left_to_end(run: WatchedRun, programs: Programs) -> None:
    chain(run)
    run.done("stage1", 100)
    programs.answers("squeue", out=squeue_row("11", "stage1.001", "RUNNING"))
    assert cancel(run.root)[0] == "its stage is done, it is ending: stage1.001 (11)"
    assert not programs.called("scancel") and not (run.root / "stage1" / "EXIT").exists()


def test_now_waits_for_nothing(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue", out=chain(run))
    programs.answers("scontrol")
    programs.answers("scancel")
    cancel(run.root, now=True)
    assert programs.called("scancel") == ["--state=PENDING 12 21 50", "11 50"]
    assert not (run.root / "stage1" / "EXIT").exists()


def test_one_stage_and_what_comes_after_it(run: WatchedRun, programs: Programs) -> None:
    rows = chain(run)
    run.record("export.001", "60", "export")
    programs.answers("squeue", out=rows + squeue_row("60", "export.001", "PENDING"))
    programs.answers("scontrol")
    programs.answers("scancel")
    cancel(run.root, "stage2")
    assert programs.called("scancel") == ["--state=PENDING 21 60"]


def test_nothing_queued_and_twice(run: WatchedRun, programs: Programs) -> None:
    chain(run)
    programs.answers("squeue")
    assert cancel(run.root) == ["nothing of it is queued or running"]
    assert cancel(run.root) == ["nothing of it is queued or running"]
    assert not programs.called("scancel")


def test_a_job_that_cannot_be_held_is_cancelled_all_the_same(
    run: WatchedRun, programs: Programs
) -> None:
    programs.answers("squeue", out=chain(run))
    programs.answers("scontrol", said="Job has already finished for job 12", code=1)
    programs.answers("scancel")
    cancel(run.root)
    assert programs.called("scancel")[0] == "--state=PENDING 12 21 50"


def test_refusal_says_what_was_done_until_then(
    run: WatchedRun, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answers("squeue", out=chain(run))
    programs.answers("scontrol")
    programs.answers("scancel", said="scancel: error: Unable to contact slurm controller", code=1)
    assert main(run.words) == 1
    assert "does not answer" in capsys.readouterr().err
    programs.answers("squeue", said="Unable to contact slurm controller", code=1)
    with pytest.raises(SlurmError, match="does not answer"):
        cancel(run.root)


def test_without_slurm(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1", cluster="local")
    assert cancel(run.root) == ["nothing of this run was ever queued"]
    run.record("stage1.001", "11")
    with pytest.raises(SlurmError, match="not on PATH"):
        cancel(run.root)


def test_a_colleagues_jobs_are_named_and_left(
    run: WatchedRun, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(run)
    programs.answers("squeue", out=squeue_row("11", "stage1.001", "RUNNING", user="rui"))
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (said, *_) = cancel(run.root)
    assert said.startswith("stage1.001 (11) belongs to rui") and "steer run=demo stop" in said
    assert not programs.called("scancel")


def test_a_local_run_is_asked_to_end(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1", cluster="local")
    run.attempt("stage1", 1)
    # A process whose command line tells of the launcher.
    code = "import time; time.sleep(60)"
    process = os.spawnv(os.P_NOWAIT, sys.executable, ["python", "-c", code, "slurm.submit"])
    try:
        (run.root / ".lock").write_text(str(process))
        while b"slurm.submit" not in Path(f"/proc/{process}/cmdline").read_bytes():
            time.sleep(0.01)  # the child still is this process
        (said, *_) = cancel(run.root)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
    assert "stage1, which runs on this machine" in said
    assert (run.root / "stage1" / "EXIT").exists()


def test_unknown_stage_and_words(run: WatchedRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.plan("stage1")
    for words, wanted in (
        (["stage=stage9"], "has no stage9; there are stage1"),
        (["stages=stage1"], "give run, runs_dir, stage, now as KEY=VALUE"),
        (["now=perhaps"], "neither true nor false"),
    ):
        assert main([*run.words, *words]) == 1
        assert wanted in capsys.readouterr().err


# --- a real Slurm ---------------------------------------------------------------------------


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


def submit_chain(run: WatchedRun) -> dict[str, str]:
    run.plan("stage1", "stage2", cluster="slurm")
    body = [SEGMENT.format(folder=run.segment("stage1", number)) for number in (1, 2)]
    ids = {"first": run.submit("stage1.001", body[0], words=["--nodes=2"])}
    ids["second"] = run.submit(
        "stage1.002", body[1], words=["--nodes=2"], dependency=f"afterany:{ids['first']}"
    )
    ids["verify"] = run.submit(
        "stage1.verify.001", "true", "verify", dependency=f"afterany:{ids['second']}"
    )
    later = SEGMENT.format(folder=run.segment("stage2", 1))
    # As after a submission that was killed: no record, only the comment.
    ids["later"] = run.submit(
        "stage2.001", later, dependency=f"afterok:{ids['verify']}", recorded=False
    )
    return ids


@pytest.mark.slurm
def test_a_real_chain_saves_and_nothing_starts_in_between(
    slurm: ThrowAwaySlurm, run: WatchedRun
) -> None:
    ids = submit_chain(run)
    array = run.submit("evaluate.001", "sleep 60", "array", ["--array=0-5%2"])
    began = run.segment("stage1", 1)
    wait_for(began / "up.1")
    said = "\n".join(cancel(run.root))
    assert slurm.wait(ids["first"], timeout=20) == "COMPLETED", slurm.output(ids["first"])
    assert (began / "saved").exists() and (began / "asked").exists()
    for name in ("second", "verify", "later"):
        assert slurm.wait(ids[name]) == "CANCELLED"
    assert not (run.segment("stage1", 2) / "began").exists()
    assert not (run.segment("stage2", 1) / "began").exists()
    assert f"stage2.001 ({ids['later']})" in said
    end = time.monotonic() + 20
    while [job for job in commands.squeue() if job.is_live]:
        assert time.monotonic() < end, "elements of the array stay"
        time.sleep(0.2)
    assert array in said
    assert cancel(run.root) == ["nothing of it is queued or running"]


@pytest.mark.slurm
def test_a_real_chain_at_once(slurm: ThrowAwaySlurm, run: WatchedRun) -> None:
    ids = submit_chain(run)
    wait_for(run.segment("stage1", 1) / "up.1")
    cancel(run.root, now=True)
    assert {slurm.wait(job, timeout=20) for job in ids.values()} == {"CANCELLED"}
    assert not (run.segment("stage1", 2) / "began").exists()
    assert json.loads((run.root / "plan.json").read_text())["format"] == 1


@pytest.mark.slurm
def test_what_the_sysadmins_page_says_cancels_a_run(slurm: ThrowAwaySlurm, run: WatchedRun) -> None:
    page = Path(__file__).parents[2] / "docs" / "for_sysadmins.md"
    lines = [line.split("  #")[0] for line in page.read_text().splitlines() if "awk" in line]
    pending, everything = (line.replace("USER", slurm.user) for line in lines)
    ids = submit_chain(run)
    other = slurm.sbatch(wrap="sleep 60")
    wait_for(run.segment("stage1", 1) / "up.1")
    slurm.run("sh", "-c", pending)
    assert {slurm.wait(ids[name]) for name in ("second", "verify", "later")} == {"CANCELLED"}
    assert slurm.state(ids["first"]) == "RUNNING"
    slurm.run("sh", "-c", everything)
    assert slurm.wait(ids["first"], timeout=20) == "CANCELLED"
    assert slurm.state(other) == "RUNNING", "no other job of the user"
