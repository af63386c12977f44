"""Slurm's programs: what is asked, what is understood, and what is said when they fail."""

import subprocess
import time
from pathlib import Path

import pytest

from slurm import commands
from slurm.answers import FIELD, parse_sacct, parse_sinfo, parse_squeue
from slurm.errors import SlurmError
from tests.slurm.programs_on_path import Programs
from tests.slurm.throwaway import ThrowAwaySlurm

# As printed by Slurm 22.05 and 23.11, and what the message must say.
COMPLAINTS = [
    ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "unreachable",
     "does not answer"),
    ("sbatch: error: Munge encode failed: Failed to access \"/run/munge/munge.socket.2\": No such "
     "file or directory\nsbatch: error: slurm_send_node_msg: auth_g_create: "
     "REQUEST_SUBMIT_BATCH_JOB has authentication error\nsbatch: error: Batch job "
     "submission failed: Protocol authentication error", "munge", "munge does not run"),
    ("scancel: error: Kill job error on job id 2737: Access/permission denied", "denied",
     "somebody else"),
    ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination "
     "specified", "account", "SLURM_ACCOUNT"),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos", "SLURM_QOS"),
    ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job "
     "violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "limits",
     "QOSMaxSubmitJobPerUserLimit"),
    ("sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed:"
     " Invalid partition name specified", "partition", "sinfo"),
    ("Slurm accounting storage is disabled", "accounting", "accounting records"),
    ("sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to "
     "host:localhost:6819: Connection refused", "accounting", "database is down"),
    ("squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\nsqueue: error: "
     "fetch_config: DNS SRV lookup failed\nsqueue: fatal: Could not establish a configuration "
     "source", "configuration", "login node"),
    ("sbatch: error: Batch job submission failed: Requested node configuration is not available",
     "shape", "sinfo"),
]  # fmt: skip


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch, alone=True)


@pytest.mark.parametrize(("said", "cause", "remedy"), COMPLAINTS)
def test_complaint_is_one_line_with_its_cause_and_a_remedy(
    programs: Programs, said: str, cause: str, remedy: str
) -> None:
    programs.answers("squeue", said=said, code=1)
    with pytest.raises(SlurmError) as caught:
        commands.squeue()
    assert caught.value.cause == cause
    message = str(caught.value)
    assert message.startswith("squeue: ") and remedy in message and "\n" not in message
    last = said.splitlines()[-1].partition(": error: ")[2] or said.splitlines()[-1]
    assert last[-40:] in message, "Slurm's own words are kept"


def test_no_slurm_on_path(programs: Programs) -> None:
    with pytest.raises(SlurmError, match="no Slurm.*CLUSTER=local") as caught:
        commands.squeue()
    assert caught.value.cause == "missing"


def test_program_that_may_not_be_run(programs: Programs) -> None:
    programs.answers("sinfo")
    (programs.directory / "sinfo").chmod(0o000)
    (programs.directory / "sinfo").unlink()
    (programs.directory / "sinfo").mkdir()  # root may run anything but a directory
    with pytest.raises(SlurmError) as caught:
        commands.sinfo_rows()
    assert caught.value.cause in ("denied", "missing")


def test_program_that_hangs_is_given_up(programs: Programs) -> None:
    programs.answers("squeue", sleep=30)
    began = time.monotonic()
    with pytest.raises(SlurmError, match="no answer in") as caught:
        commands.run(["squeue"], timeout=0.3)
    assert caught.value.cause == "unreachable" and time.monotonic() - began < 5


def test_users_variables_change_nothing(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SQUEUE_FORMAT", "SLURM_JOB_ID", "SBATCH_PARTITION", "SCANCEL_INTERACTIVE"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("SLURM_CONF", "/etc/here")
    monkeypatch.setenv("LC_ALL", "pt_PT.UTF-8")
    seen = tmp_path / "seen"
    for name in ("squeue", "sbatch"):
        path = programs.directory / name
        path.write_text(f"#!/bin/sh\nenv > {seen}.{name}\necho 17\n")
        path.chmod(0o755)
    commands.run(["squeue"])
    assert commands.sbatch(tmp_path / "submit.sh") == "17"
    told = seen.with_name("seen.squeue").read_text().splitlines()
    assert not [line for line in told if line.endswith("=mine")]
    assert {"SLURM_CONF=/etc/here", "LC_ALL=C", "SLURM_TIME_FORMAT=%s"} <= set(told)
    told = seen.with_name("seen.sbatch").read_text().splitlines()
    # What a job inherits is the user's own locale.
    assert "LC_ALL=pt_PT.UTF-8" in told and not [line for line in told if line.endswith("=mine")]


def test_sbatch_ids(programs: Programs, tmp_path: Path) -> None:
    programs.answers("sbatch", out="4242;mn5\n", said="sbatch: a note of the site\n")
    assert commands.sbatch(tmp_path / "submit.sh", ["--hold"]) == "4242"
    assert programs.called("sbatch") == [f"--parsable --hold {tmp_path / 'submit.sh'}"]
    programs.answers("sbatch", out="Welcome!\n")
    with pytest.raises(SlurmError, match="instead of a job's id"):
        commands.sbatch(tmp_path / "submit.sh")


def row(*fields: str) -> str:
    return "\x1e" + FIELD.join(fields) + "\n"


ONE = ("12", "N/A", "PENDING", "Dependency", "ana", "acc", "1795253398", "N/A", "0:00",
       "2-23:59:59", "4", "", "afterok:11(unfulfilled)")  # fmt: skip


def test_squeue_is_parsed_whatever_names_hold() -> None:
    name = "new\nline|\t; ü $(x)\x1e7"
    text = row(*ONE, name, "a\nb\x1fc") + row(*ONE, "plain", "(null)")
    odd, plain = parse_squeue(text)
    assert (odd.job_id, odd.name, odd.comment) == ("12", name, "a\nb\x1fc")
    assert (odd.state, odd.reason, odd.array_index) == ("PENDING", "Dependency", None)
    assert (odd.left, odd.nodes, odd.start) == (259199.0, 4, None)
    assert odd.dependency == "afterok:11(unfulfilled)" and odd.is_live
    assert (plain.name, plain.comment, plain.key) == ("plain", "", "12")
    assert parse_squeue("") == []


def test_squeue_elements_ended_and_unlimited() -> None:
    element = list(ONE)
    element[1:3], element[7:11] = ["7", "COMPLETED"], ["1795253400", "1-01:02:03", "UNLIMITED", "1"]
    (job,) = parse_squeue(row(*element, "n", "c"))
    assert (job.key, job.is_live, job.used, job.left) == ("12_7", False, 90123.0, None)
    assert job.start == 1795253400.0


def test_squeue_that_prints_something_else_is_refused() -> None:
    for text in ("\x1eCLUSTER: mn5\n", "hello", row(*ONE[:5])):
        with pytest.raises(SlurmError, match="not what it was asked for"):
            parse_squeue(text)


def sacct_line(key: str, state: str, seconds: str, tres: str, name: str = "n") -> str:
    fields = [key, name, state, "0:0", "1795253400", "Unknown", seconds, "2", tres]
    return FIELD.join(fields) + "\n"


def test_sacct_adds_up_requeues_and_counts_gpus() -> None:
    text = sacct_line("9", "REQUEUED", "100", "billing=8,gres/gpu:h100=8,gres/gpu=8,node=2")
    text += sacct_line("9", "CANCELLED by 1000", "20", "billing=8,gres/gpu=8", "a|b" + FIELD + "c")
    text += sacct_line("10_3", "COMPLETED", "", "") + "noise\n"
    jobs = parse_sacct(text)
    assert set(jobs) == {"9", "10_3"}
    nine = jobs["9"]
    assert (nine.state, nine.seconds, nine.gpu_seconds, nine.starts) == ("CANCELLED", 120, 960, 2)
    assert nine.name == "a|b" + FIELD + "c" and nine.end is None
    assert jobs["10_3"].gpu_seconds == 0


def test_sacct_without_accounting_is_none(programs: Programs) -> None:
    assert commands.sacct(["1"]) is None, "not on PATH"
    programs.answers("sacct", said="Slurm accounting storage is disabled", code=1)
    assert commands.sacct(["1", "2"]) is None
    assert commands.sacct([]) == {}
    assert len(programs.called("sacct")) == 1


def test_sinfo_is_parsed() -> None:
    fields = ["acc", "acc*", "up", "3-00:00:00", "1120", "2", "40", "1", "515000+",
              "gpu:h100:4(S:0-3)", "(null)", "mixed-"]  # fmt: skip
    (acc,) = parse_sinfo(row(*fields))
    assert acc.is_default and acc.is_up and acc.features == ""
    assert (acc.nodes, acc.sockets * acc.cores, acc.memory_mb) == (1120, 80, 515000)


def test_scancel_of_jobs_that_are_gone_is_no_error(programs: Programs) -> None:
    gone = "scancel: error: Kill job error on job id 5: Invalid job id specified\n"
    programs.answers("scancel", said=gone, code=1)
    commands.scancel(["5"])
    commands.scancel([])
    assert len(programs.called("scancel")) == 1
    denied = "scancel: error: Kill job error on job id 6: Access/permission denied\n"
    programs.answers("scancel", said=gone + denied, code=1)
    with pytest.raises(SlurmError, match="somebody else"):
        commands.scancel(["5", "6"], signal="USR2", batch=True)
    assert programs.called("scancel")[-1] == "--signal=USR2 --batch 5 6"


@pytest.mark.slurm
def test_a_real_queue_with_odd_names(slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH --output=/dev/null\nsleep 60\n")
    name, comment = "odd |; ü $(x) %j\nline\x1e", "amalia-vl:/a b/c|d"
    first = commands.sbatch(script, [f"--job-name={name}", f"--comment={comment}"])
    second = commands.sbatch(script, [f"--dependency=afterok:{first}"])
    array = commands.sbatch(script, ["--array=0-4%1", "--hold"])
    jobs = {job.key: job for job in commands.squeue()}
    assert (jobs[first].name, jobs[first].comment) == (name, comment)
    assert abs((jobs[first].submitted or 0) - time.time()) < 60
    assert jobs[second].dependency == f"afterok:{first}(unfulfilled)"
    elements = [jobs[f"{array}_{number}"] for number in range(5)]
    assert {job.reason for job in elements} <= {"JobHeldUser", "JobHeldAdmin"}
    commands.release(array)
    commands.hold(array)
    commands.update(array, TimeLimit="5")
    commands.scancel([array, first, second, "1"])
    assert not [job for job in commands.squeue() if job.is_live and job.state != "COMPLETING"]


@pytest.mark.slurm
def test_a_real_refusal_and_test_only(slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH --partition=acc --nodes=2 --output=/dev/null\ntrue\n")
    assert "to start at" in commands.test_only(script)
    with pytest.raises(SlurmError, match="Requested node configuration is not available"):
        commands.sbatch(script, ["--gpus-per-node=9"])
    with pytest.raises(SlurmError, match="Invalid partition"):
        commands.test_only(script, ["--partition=nope"])
    partitions = {row.partition: row for row in commands.sinfo_rows()}
    assert partitions["acc"].gres == "gpu:4" and partitions["cpu"].is_default
    assert {line["PartitionName"] for line in commands.show_partition()} == {"acc", "cpu"}
    assert commands.show_config()["MaxArraySize"] == "1001"
    assert commands.sacct(["1"]) is None, "this Slurm keeps no accounts"


@pytest.mark.slurm
def test_real_accounts(slurm_accounting: ThrowAwaySlurm, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\n#SBATCH --output=/dev/null\nsleep 2; exit 3\n")
    job = commands.sbatch(script, ["--partition=acc", "--gpus-per-node=2", "--job-name=x.stage1.1"])
    slurm_accounting.wait(job)
    end = time.monotonic() + 20
    while True:  # the database hears of it a little later
        accounts = commands.sacct([job])
        assert accounts is not None and time.monotonic() < end
        # Under load its end is known before its name.
        if job in accounts and (accounts[job].state, accounts[job].name) == (
            "FAILED",
            "x.stage1.1",
        ):
            break
        time.sleep(0.2)
    assert accounts[job].gpu_seconds == 2 * accounts[job].seconds >= 4
    assert accounts[job].exit_code == "3:0"
    with pytest.raises(SlurmError, match="SLURM_QOS"):
        commands.sbatch(script, ["--qos=nope"])
    with pytest.raises(SlurmError, match="SLURM_ACCOUNT"):
        commands.sbatch(script, ["--account=nope"])


@pytest.mark.slurm
def test_controller_that_is_down(slurm: ThrowAwaySlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = Path(slurm.env["SLURM_CONF"])
    other = conf.with_name("elsewhere.conf")
    port = next(line for line in conf.read_text().splitlines() if line.startswith("SlurmctldPort="))
    text = conf.read_text().replace(port, "SlurmctldPort=9")
    other.write_text(text.replace("SlurmctldTimeout=10", "SlurmctldTimeout=1"))
    monkeypatch.setenv("SLURM_CONF", str(other))
    with pytest.raises(SlurmError) as caught:
        commands.squeue()
    assert caught.value.cause == "unreachable"
    subprocess.run(["rm", "-f", str(other)], check=True)
