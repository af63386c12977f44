"""What `make status` says, and what it costs Slurm."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from slurm import queue_look
from slurm.answers import FIELD
from slurm.array_items import Item, TaskFolder, Wave
from slurm.reasons import in_words
from slurm.status import main, status
from slurm.status_text import age, duration
from tests.slurm.programs_on_path import Programs
from tests.slurm.throwaway import ThrowAwaySlurm
from tests.slurm.watched_run import WatchedRun

LOADED = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WatchedRun:
    monkeypatch.setenv("COLUMNS", "100")
    return WatchedRun(tmp_path / "runs")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch, alone=True)


def squeue_row(job_id: str, name: str, state: str, reason: str = "None", **given: str) -> str:
    index, start = given.get("index", "N/A"), given.get("start", "N/A")
    fields = [job_id, index, state, reason, "ana", "acc", "1795253398", start,
              given.get("used", "0:00"), given.get("left", "1:00:00"), "2",
              given.get("nodes", ""), given.get("dependency", "(null)"), name,
              given.get("comment", "(null)")]  # fmt: skip
    return "\x1e" + FIELD.join(fields) + "\n"


def said_json(run: WatchedRun, *words: str) -> dict[str, Any]:
    value = json.loads(status([*run.words, "json=true", *words]))
    assert isinstance(value, dict)
    return value


def queued_run(run: WatchedRun) -> str:
    """Stage 1 done, stage 2 in its second segment, stage 3 waiting; what squeue prints."""
    run.plan("stage1", "stage2", "stage3")
    run.trained("stage1", 100)
    run.saved("stage1", 100, ago=7200)
    run.done("stage1", 100)
    run.attempt("stage1", 1, "done", job_id="11", ago=7200)
    run.trained("stage2", 40, loss=1.25, seconds=0.5)
    run.saved("stage2", 30, ago=240)
    run.attempt("stage2", 1, "stopped", job_id="21", ago=2000)
    run.attempt("stage2", 2, job_id="22", seconds=1800)
    for name, job_id in (("stage1.001", "11"), ("stage2.001", "21"), ("stage2.002", "22")):
        run.record(name, job_id)
    run.record("stage2.verify.001", "23", "verify", "afterany:21:22")
    run.record("stage3.001", "31", dependency="afterok:23")
    run.record("export.001", "40", "export", "afterok:32")
    return (
        squeue_row("22", "demo.stage2.002", "RUNNING", used="30:00", left="30:00", nodes="as[1-2]")
        + squeue_row("23", "demo.stage2.verify.001", "PENDING", "Dependency",
                     dependency="afterany:22(unfulfilled)")
        + squeue_row("31", "demo.stage3.001", "PENDING", "Priority", start="4102444800")
        + squeue_row("40", "demo.export.001", "PENDING", "JobHeldUser")
        + squeue_row("99", "demo.stage1.001", "RUNNING", comment="amalia-vl:/another/demo")
    )  # fmt: skip


def test_the_table_of_a_run_in_the_middle(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue", out=queued_run(run))
    told = status(run.words)
    assert max(map(len, told.splitlines()[1:])) <= 100, told
    assert "stage2  running" in told and "40/100" in told and "1.2500" in told
    assert "2,000" in told and "30, 4 min ago" in told
    lines = told.splitlines()
    (segment,) = [line for line in lines if line.startswith("stage2 segment 2/2")]
    assert "22" in segment and "RUNNING" in segment and "as[1-2]" in segment
    assert "0:30:00 of 1:00:00" in segment
    (verify,) = [line for line in lines if line.startswith("stage2 verify 1")]
    assert "waits for end of stage2.002" in verify
    (third,) = [line for line in lines if line.startswith("stage3 segment 1")]
    assert "~ 01 Jan" in third and "Priority: jobs of higher" in third
    assert "JobHeldUser: held by its owner;" in told and "release 40` lets it start" in told
    assert " 99 " not in told and "stage1 segment" not in told, "other runs and what went well"
    every = status([*run.words, "all=true"])
    (first,) = [line for line in every.splitlines() if line.startswith("stage1 segment 1")]
    assert "COMPLETED" in first, "as its attempt says"


def test_hours_used_and_left(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue", out=queued_run(run))
    value = said_json(run)
    hours = {stage["name"]: (stage["hours_used"], stage["hours_left"]) for stage in value["stages"]}
    assert hours["stage1"] == (pytest.approx(8.0), 0.0)  # 1 h of 8 GPUs
    assert hours["stage2"][0] == pytest.approx(8.0 + 4.0, rel=1e-3)  # and 0.5 h until now
    assert hours["stage2"][1] == pytest.approx(60 * 0.5 / 3600 * 8)
    assert hours["stage3"] == (0.0, 10.0)  # as planned
    assert value["unit"] == "GPU-hours" and not value["accounting"]
    assert "(5.00 node-hours used, 2.52 left), by the run's own records" in status(run.words)


def test_accounting_wins_over_the_runs_own_records(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue", out=queued_run(run))
    line = ["11", "demo.stage1.001", "COMPLETED", "0:0", "1", "2", "7200", "2", "gres/gpu=8"]
    foreign = ["21", "somebody.else", "COMPLETED", "0:0", "1", "2", "7200", "2", "gres/gpu=8"]
    programs.answers("sacct", out=FIELD.join(line) + "\n" + FIELD.join(foreign) + "\n")
    value = said_json(run)
    assert value["accounting"]
    assert value["stages"][0]["hours_used"] == pytest.approx(16.0)
    assert value["stages"][1]["hours_used"] == pytest.approx(12.0, rel=1e-3)  # its id, not its name
    assert "by Slurm's accounting" in status(run.words)


@pytest.mark.parametrize("start", ["Unknown", "1795253400"])
def test_accounts_of_a_job_that_never_began(
    run: WatchedRun, programs: Programs, start: str
) -> None:
    run.plan("stage1", "stage2")
    run.record("stage2.001", "21", dependency="afterok:12")
    programs.answers("squeue")
    fields = ["21", "demo.stage2.001", "CANCELLED by 0", "0:0", start, "1795253400", "0", "2", ""]
    programs.answers("sacct", out=FIELD.join(fields) + "\n")
    assert "never began: predecessor failed, or cancelled" in " ".join(status(run.words).split())


def test_one_squeue_one_sacct_a_minute(
    run: WatchedRun, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.answers("squeue", out=queued_run(run))
    programs.answers("sacct", said="Slurm accounting storage is disabled", code=1)

    def calls() -> tuple[int, int]:
        return len(programs.called("squeue")), len(programs.called("sacct"))

    for _ in range(3):
        status(run.words)
    assert calls() == (1, 1)
    assert "--me" in programs.called("squeue")[0] and "-r" in programs.called("squeue")[0]
    assert "11,21,22,23,31,40" in programs.called("sacct")[0]
    status([*run.words, "refresh=true"])
    assert calls() == (2, 2)
    now = time.time()
    monkeypatch.setattr(queue_look.time, "time", lambda: now + 61)
    status(run.words)
    assert calls() == (3, 3)
    monkeypatch.setattr(queue_look.time, "time", lambda: now + 90)
    assert "Slurm asked 29 s ago (refresh=true asks again)" in status(run.words)
    run.record("stage3.002", "33")  # a new submission: the old answer does not know it
    status(run.words)
    assert calls() == (4, 4)
    status([f"runs_dir={run.root.parent}"])
    assert calls() == (4, 4), "a list of runs asks nothing"


def test_a_kept_answer_that_was_tampered_with_is_not_used(
    run: WatchedRun, programs: Programs
) -> None:
    programs.answers("squeue", out=queued_run(run))
    status(run.words)
    kept = json.loads((run.root / ".status.json").read_text())
    for change in ({"jobs": [{"job_id": 7}]}, {"taken": "now"}, {"format": 9}, {"jobs": 3}):
        (run.root / ".status.json").write_text(json.dumps({**kept, **change}))
        assert "stage2 segment 2" in status(run.words)
    kept["jobs"][0]["used"] = "\x1b[2J"
    (run.root / ".status.json").write_text(json.dumps(kept))
    assert "stage2 segment 2" in status(run.words)
    (run.root / ".status.json").write_text("[")
    status(run.words)
    assert len(programs.called("squeue")) == 7


def test_slurm_that_does_not_answer(run: WatchedRun, programs: Programs) -> None:
    queued_run(run)
    programs.answers("squeue", said=LOADED, code=1)
    told = status(run.words)
    assert "from the files alone" in told and "does not answer" in told
    assert "stage2  unknown" in told and "40/100" in told
    status(run.words)
    assert len(programs.called("squeue")) == 1, "a controller in trouble is not asked more often"
    assert not programs.called("sacct")


def test_without_any_slurm(run: WatchedRun, programs: Programs) -> None:
    queued_run(run)
    told = status(run.words)
    assert "from the files alone: no Slurm on this machine" in told and "40/100" in told


def test_a_local_run_asks_no_slurm(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue")
    run.plan("stage1", cluster="local")
    run.trained("stage1", 7, loss=float("nan"))
    run.attempt("stage1", 1, "stopped")
    told = status(run.words)
    assert "stage1  paused" in told and "nan" in told and "no Slurm job belongs to it" in told
    assert "goes on from step 0" in told
    assert not programs.called("squeue")
    assert said_json(run)["stages"][0]["loss"] is None
    (run.root / ".lock").write_text(str(os.getpid()))  # pytest, not the launcher
    assert "stage1  paused" in status(run.words)


def test_why_a_stage_failed(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1", "stage2")
    run.trained("stage1", 3)
    log = run.log("stage1", 1, "0: error: CUDA out of memory\n")
    run.attempt("stage1", 1, "failed", job_id="11", reason="error: CUDA out of memory")
    run.record("stage1.001", "11")
    run.record("stage2.001", "21", dependency="afterok:12")
    programs.answers(
        "squeue",
        out=squeue_row("11", "demo.stage1.001", "FAILED", "NonZeroExitCode")
        + squeue_row("21", "demo.stage2.001", "CANCELLED", "DependencyNeverSatisfied"),
    )
    told = status(run.words)
    assert "stage1  failed" in told
    assert "stage1: last attempt exit code 1: error: CUDA out of memory" in told
    assert "DependencyNeverSatisfied: predecessor failed" in told and "stage2  cancelled" in told
    (run.root / "stage1" / "FAILED.json").write_text('{"reason": "2 attempts\\u001b[31m failed"}')
    told = status(run.words)
    assert "stage1 failed: 2 attempts?[31m failed" in told and "\x1b" not in told
    assert os.path.relpath(log) in told or str(log) in told
    (run.root / "stage1" / "FAILED.json").write_text("{")
    assert "stage1 failed: see" in status(run.words)


def test_stop_files_and_excluded_nodes(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1", cluster="local")
    (run.root / "STOP").touch()
    (run.root / "stage1" / "SAVE").touch()
    entry = {"as07": {"reason": "no device 3", "job": "11", "time": 1.0}}
    (run.root / "exclude_nodes.json").write_text(json.dumps(entry))
    told = status(run.words)
    assert "stage1  stopped" in told and "nothing starts until it is removed" in told
    assert "the next step is saved" in told
    assert "node as07 is avoided: no device 3" in told
    (run.root / "exclude_nodes.json").write_text("[1")
    assert "exclude_nodes.json is damaged" in status(run.words)


def test_damaged_files_do_not_stop_it(run: WatchedRun, programs: Programs) -> None:
    programs.answers("squeue", out=queued_run(run))
    (run.root / "stage2" / "config.yaml").write_text("{: [")
    (run.root / "stage2" / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": "x"\n\xff')
    (run.root / "stage2" / "attempts.jsonl").write_text("nonsense\n")
    (run.root / "plan.json").write_text("nonsense")
    damaged = run.root / "stage3" / "segments" / "001" / "job.json"
    damaged.write_text("{}")
    told = status(run.words)
    assert f"{damaged} is damaged" in told and "stage1  done" in told
    odd = {"name": "stage1", "segments": "x", "gpu_hours": [], "cluster": 3}
    for plan in ({"stages": [odd]}, {"stages": 7}, {"stages": ["stage1"]}, [1]):
        (run.root / "plan.json").write_text(json.dumps(plan))
        assert "stage1  done" in status(run.words)
    for lock in ("9" * 30, "-1", "0", "pid\xff"):
        (run.root / ".lock").write_text(lock)
        assert "stage1  done" in status(run.words)


def test_how_much_of_the_gpus_is_used(run: WatchedRun, programs: Programs) -> None:
    """Steps of 1 s and 3 s; what an older run did not record is left out."""
    programs.answers("squeue", out=queued_run(run))
    assert "MFU" not in status(run.words)
    lines = [{"step": 1, "tokens": 10, "seconds": 2.0}]
    for step, seconds, mfu in ((2, 1.0, 0.2), (3, 3.0, 0.4)):
        speed = {"tflops_per_gpu": 1000 * mfu, "mfu": mfu}
        lines.append({"step": step, "tokens": 10, "seconds": seconds, **speed})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.root / "stage2" / "metrics.jsonl").write_text(text)
    told = status(run.words)
    assert "MFU" in told and "35.0 %" in told
    assert max(map(len, told.splitlines()[1:])) <= 100, told
    stage = said_json(run)["stages"][1]
    assert (stage["mfu"], stage["tflops_per_gpu"]) == (pytest.approx(0.35), pytest.approx(350))
    no_peak = json.dumps({**lines[-1], "mfu": None, "tflops_per_gpu": "x"})
    (run.root / "stage2" / "metrics.jsonl").write_text(no_peak + "\n")
    assert said_json(run)["stages"][1]["mfu"] is None


def test_segments_that_only_wait_for_each_other_are_one_line(
    run: WatchedRun, programs: Programs
) -> None:
    run.plan("stage1")
    rows = squeue_row("11", "demo.stage1.001", "RUNNING", used="1:00", left="UNLIMITED")
    run.record("stage1.001", "11")
    for number in range(2, 6):
        run.record(f"stage1.{number:03d}", str(10 + number))
        after = f"afterany:{9 + number}(unfulfilled)"
        rows += squeue_row(
            str(10 + number), f"demo.stage1.{number:03d}", "PENDING", "Dependency", dependency=after
        )
    run.record("stage1.verify.001", "16", "verify")
    after = "afterok:7(unfulfilled),afterany:11:12:13:14:15(unfulfilled)"
    rows += squeue_row("16", "demo.stage1.verify.001", "PENDING", "Dependency", dependency=after)
    programs.answers("squeue", out=rows)
    lines = status(run.words).splitlines()
    (together,) = [line for line in lines if "12-15" in line]
    assert together.startswith("stage1 segment 2-5/5") and "end of stage1.001" in together
    text = " ".join(" ".join(lines).split())
    assert "waits for success of 7 and end of stage1.001 to 005" in text
    assert (
        len([line for line in status([*run.words, "all=true"]).splitlines() if "/5" in line]) == 5
    )


def test_an_ended_job_does_not_tell_why_it_once_waited(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1")
    run.record("stage1.001", "11")
    programs.answers("squeue", out=squeue_row("11", "demo.stage1.001", "CANCELLED", "JobHeldUser"))
    told = status([*run.words, "all=true"])
    assert "cancelled before it began" in told and "release" not in told
    assert "stage1 segment" not in status(run.words), "somebody wanted it so"


def test_jobs_that_only_slurm_knows_of(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1")
    comment = f"amalia-vl:{run.root}"
    row = squeue_row("77", "demo.stage1.verify.001", "PENDING", "Resources", comment=comment)
    programs.answers("squeue", out=row)
    (job,) = said_json(run)["jobs"]
    assert (job["kind"], job["stage"], job["number"], job["is_live"]) == (
        "verify",
        "stage1",
        1,
        True,
    )


def test_arrays(run: WatchedRun, programs: Programs) -> None:
    items = [Item(f"item{n}", ("tools.x", str(n))) for n in range(8)]
    elements = tuple((items[n], items[n + 1]) for n in (0, 2, 4, 6))
    wave = Wave("evaluate", 1, 1, (), 2, 1.0, elements, waiting=3)
    folder = TaskFolder.of(run.root, "evaluate")
    folder.wave(1).mkdir(parents=True)
    wave.write(folder.wave(1))
    for item in items[:3]:
        folder.end(item, wave, 0, {})
    folder.end(items[4], wave, 9, {"said": "no such file"})
    run.record("evaluate.001", "50", "array")
    name = "demo.evaluate.001"
    programs.answers(
        "squeue",
        out=squeue_row("50", name, "COMPLETED", index="0")
        + squeue_row("50", name, "RUNNING", index="1")
        + squeue_row("50", name, "FAILED", "NonZeroExitCode", index="2")
        + squeue_row("50", name, "PENDING", "JobArrayTaskLimit", index="3"),
    )
    told = status(run.words)
    assert (
        "array evaluate, wave 1: 1 of 4 elements done, 1 running, 1 pending, 1 failed, 3 for later "
        "waves; 3 of 8 items done, 1 failed (item4: exit code 9: no such file)"
    ) in told
    assert "evaluate wave 1" in told
    folder.note("the queue is full", "python -m slurm.arrays task=evaluate")
    (folder.root / "STOP").touch()
    told = status(run.words)
    assert "array evaluate stopped: the queue is full; go on with: python -m slurm.arrays" in told
    assert "nothing starts until it is removed" in told
    (folder.wave(1) / "items.json").write_text("{")
    assert "items.json is damaged" in status(run.words)


def test_a_list_of_runs_and_names_that_do_not_exist(
    run: WatchedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.plan("stage1", "stage2")
    run.trained("stage1", 7)
    WatchedRun(run.root.parent, "empty")
    runs = f"runs_dir={run.root.parent}"
    assert main([runs]) == 0
    assert capsys.readouterr().out == "demo: stage1 paused at 7/100, stage2 not begun\n"
    for words, wanted in (
        ([runs, "run=dema"], "does not exist; there are demo"),
        ([runs, "run=../runs/demo"], "is not the name of a run"),
        ([runs, "run=demo", "refresh=perhaps"], "refresh=perhaps is neither true nor false"),
        ([runs, "model=tiny"], "give run, runs_dir, refresh, all, json as KEY=VALUE"),
    ):
        assert main(words) == 1
        told = capsys.readouterr()
        assert wanted in told.err and told.err.startswith("error: ") and not told.out


def test_steps_of_a_stage_that_counts_epochs(run: WatchedRun, programs: Programs) -> None:
    run.plan("stage1", cluster="local")
    run.stage("stage1", steps=None)
    run.trained("stage1", 7)
    assert "7/?" in status(run.words)
    run.log("stage1", 1, "0: [stage1] step 7/321  loss 5.7020  |g| 0.3\n")
    assert "7/321" in status(run.words)


def test_words() -> None:
    assert [duration(s) for s in (0, 3725.4, 200000)] == ["0:00:00", "1:02:05", "2-07:33:20"]
    assert [age(s) for s in (-5, 89, 300, 7200, 90000, 600000)] == [
        "0 s",
        "89 s",
        "5 min",
        "2 h",
        "25 h",
        "7 days",
    ]
    assert in_words("QOSMaxWallDurationPerJobLimit").startswith("QOSMaxWall")
    assert "walltime above the limit" in in_words("QOSMaxWallDurationPerJobLimit")
    assert "allow at once" in in_words("QOSMaxJobsPerUserLimit")
    assert "`scancel 17`" in in_words("BadConstraints", "17")
    assert "hours are used up" in in_words("AssocGrpBillingMinutes")
    assert in_words("None") == "" and in_words("SomethingNew") == "SomethingNew"


# --- a real Slurm ---------------------------------------------------------------------------


def count_real_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    programs = Programs(tmp_path / "counting", monkeypatch, alone=False)
    for name in ("squeue", "sacct", "scontrol", "sinfo"):
        programs.counts(name)
    return programs


@pytest.mark.slurm
def test_a_failing_stage_cancels_its_successors_and_status_says_why(
    slurm: ThrowAwaySlurm, run: WatchedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.plan("stage1", "stage2")
    first = run.submit("stage1.001", "echo 'error: the disk is full'; exit 7")
    verify = run.submit("stage1.verify.001", "false", "verify", dependency=f"afterany:{first}")
    second = run.submit("stage2.001", "true", dependency=f"afterok:{verify}")
    export = run.submit("export.001", "true", "export", dependency=f"afterok:{second}")
    slurm.wait(export, timeout=30)
    slurm.wait(second)
    programs = count_real_calls(tmp_path, monkeypatch)
    told = status(run.words)
    assert len(programs.called("squeue")) == 1 and len(programs.called("sacct")) == 1
    assert not programs.called("scontrol") and not programs.called("sinfo")
    lines = {line.partition("  ")[0]: line for line in told.splitlines()}
    assert "FAILED" in lines["stage1 segment 1/1"] and first in lines["stage1 segment 1/1"]
    assert "NonZeroExitCode: ended with an error" in lines["stage1 segment 1/1"]
    for name in ("stage2 segment 1/1", "export.001"):
        assert "CANCELLED" in lines[name] and "predecessor failed" in lines[name]
    status(run.words)
    assert len(programs.called("squeue")) == 1


@pytest.mark.slurm
def test_a_real_queue(slurm: ThrowAwaySlurm, run: WatchedRun) -> None:
    run.plan("stage1", "stage2")
    first = run.submit("stage1.001", "sleep 60", words=["--nodes=2", "--time=10"])
    run.submit("stage1.verify.001", "true", "verify", dependency=f"afterany:{first}")
    run.submit("stage2.001", "true", words=["--hold"], recorded=False)
    run.submit("evaluate.001", "sleep 60", "array", ["--array=0-3%1"])
    slurm.wait(first, "RUNNING")
    if os.geteuid() == 0:  # a colleague has submitted a part of it
        os.chown(run.root / "stage1" / "verify" / "001" / "job.json", 65534, -1)
    value = said_json(run)
    assert not value["queue_problem"]
    jobs = {job["name"]: job for job in value["jobs"]}
    running = jobs["demo.stage1.001"]
    assert running["state"] == "RUNNING" and running["nodes"] == 2 and running["left"] <= 600
    assert running["node_list"] == "cpu[1-2]"
    assert jobs["demo.stage1.verify.001"]["reason"] == "waits for end of stage1.001"
    assert (
        "release" in jobs["demo.stage2.001"]["reason"]
        or "operator" in (jobs["demo.stage2.001"]["reason"])
    )
    array = jobs["demo.evaluate.001"]
    assert array["running"] + array["pending"] == 4 and array["pending"] >= 3
    assert value["stages"][0]["state"] == "running" and value["stages"][1]["state"] == "queued"


@pytest.mark.slurm
def test_real_accounts_tell_of_jobs_that_squeue_has_forgotten(
    slurm_accounting: ThrowAwaySlurm,
    run: WatchedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.plan("stage1", "stage2")
    gpus = ["--partition=acc", "--gpus-per-node=4"]
    first = run.submit("stage1.001", "sleep 3; exit 7", words=gpus)
    second = run.submit("stage2.001", "true", dependency=f"afterok:{first}")
    slurm_accounting.wait(second)
    programs = count_real_calls(tmp_path, monkeypatch)
    end = time.monotonic() + 30
    while True:  # the database hears of it a little later
        value = said_json(run, "refresh=true")
        if value["jobs"][0]["gpu_seconds"] and value["hours_used"] or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert value["accounting"] and value["stages"][0]["hours_used"] >= 3 * 4 / 3600
    assert len(programs.called("squeue")) == len(programs.called("sacct"))
    # As after the site's MinJobAge: squeue no longer shows them.
    programs.answers("squeue")
    told = status([*run.words, "refresh=true"])
    assert "exit code 7:0" in told and "never began: predecessor failed, or cancelled" in told
