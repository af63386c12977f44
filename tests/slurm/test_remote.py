"""From a laptop over SSH: what is sent, what arrives, what is refused."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conf.schema.errors import ConfigError
from conf.snapshot import PACKAGES
from slurm import remote, remote_code, remote_host
from slurm.remote_tunnel import Host, Said

COMMIT = "0123456789abcdef" * 2 + "01234567"
SUBMIT = ["verb=submit", "cluster=slurm", "stages=[stage1]"]
# Hostile where a shell, Hydra or a terminal would be careless.
HOSTILE = ["run=x; rm -rf ~", "a='b'", 'c="$(touch hacked)"', "d=`id`", "e=\n#", "f=*", "", "g=ã\\"]


class Here:
    """In place of an SSH connection: the same shell lines, run by this machine's shell."""

    host = "user@here"

    def __init__(self, home: Path) -> None:
        self.home = home

    def ask(self, command: str, seconds: int = 60) -> Said:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd="/",
            env={"HOME": str(self.home), "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return Said(done.stdout, done.stderr, done.returncode)


def request(*words: str) -> remote.Request:
    return remote.parse(["host=user@login.example", *words], {})


def look(home: Path, *options: str, words: list[str] = SUBMIT) -> dict[str, object]:
    return remote.look(Here(home), request(*options, *words), COMMIT)  # type: ignore[arg-type]


def git(repository: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=no")
    return subprocess.run(
        ["git", "-C", str(repository), *identity, *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "a repository"
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "module.py").write_text(f"name = {package!r}\n")
    (root / "README.md").write_text("text\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    return root


# --- the command line ------------------------------------------------------------------------


def test_everything_after_the_verb_is_the_verbs() -> None:
    found = remote.parse(["host=me@mn5", "dir=/x", "verb=logs", "host=a", "python=b", "odd"], {})
    assert (found.host, found.directory, found.verb) == (Host("mn5", "me"), "/x", "logs")
    assert found.words == ("host=a", "python=b", "odd") and not found.follows
    assert request("verb=logs", "follow=true").follows
    assert not request("verb=status", "follow=true").follows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verb=status"], "no host="),
        (["host=a@b"], "no verb="),
        (["host=a@b", "verb=rm"], "none of submit, status"),
        (["host=a@b", "run=x", "verb=status"], "follows verb="),
        (["host=a@-oProxyCommand=id", "verb=status"], "is not user@host"),
        (["host=$(id)@b", "verb=status"], "is not user@host"),
        (["host=a@b;id", "verb=status"], "is not user@host"),
        (["host=@b", "verb=status"], "is not user@host"),
        (["host=a@b", "port=70000", "verb=status"], "port="),
        (["host=a@b", "identity=/no/such/key", "verb=status"], "no such key"),
        (["host=a@b", "verb=submit", "stages=[stage1]"], "give CLUSTER="),
        (["host=a@b", "verb=submit", "cluster=slurm", "cluster=local"], "give CLUSTER="),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_sent(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert remote.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_account_of_the_laptop_goes_along_only_if_it_has_one() -> None:
    own = {"SLURM_ACCOUNT": "ehpc01", "SLURM_QOS": "acc_ehpc", "HOME": "/h"}
    words = remote.parse(["host=a@b", *SUBMIT, "cluster.account=other"], own).words
    # Hydra takes the last of several, so what is typed wins.
    assert words[:2] == ("cluster.account='ehpc01'", "cluster.qos='acc_ehpc'")
    assert words[-1] == "cluster.account=other"
    assert not [word for word in request(*SUBMIT).words if "account" in word or "qos" in word]
    assert remote.parse(["host=a@b", "verb=status"], own).words == ()
    with pytest.raises(ConfigError, match="SLURM_ACCOUNT"):
        remote.parse(["host=a@b", *SUBMIT], {"SLURM_ACCOUNT": "x' stage=stage2"})


def test_the_home_that_a_shell_put_in_place_of_its_tilde_is_the_one_there() -> None:
    at_home = {"HOME": "/home/ana"}

    def directory(path: str) -> str:
        return remote.parse(["host=a@b", f"dir={path}", "verb=status"], at_home).directory

    assert directory("/home/ana/x y") == "~/x y" and directory("/home/ana") == "~"
    assert directory("/home/anabela/x") == "/home/anabela/x" and directory("") == "~/amalia-vl"


def test_hostile_words_arrive_as_they_are(tmp_path: Path) -> None:
    program = tmp_path / "py thon"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$(cat <<\'.\'\n{_ECHO}\n.\n)" "$@"\n')
    program.chmod(0o755)
    directory = tmp_path / "odd $(touch hacked) 'place"
    directory.mkdir()
    there = {"directory": str(directory), "python": str(program)}
    said = Here(tmp_path).ask(remote.verb_command(request(*SUBMIT, *HOSTILE), there, COMMIT))
    heard = json.loads(said.out)
    assert heard["words"] == ["-m", "slurm.submit", *SUBMIT[1:], *HOSTILE]
    assert heard["directory"] == str(directory)
    assert heard["path"] == f"{directory}/code/{COMMIT}" and heard["safe"] == "1"
    assert not list(tmp_path.rglob("hacked"))


_ECHO = """
import json, os, sys
print(json.dumps({"words": sys.argv[1:], "directory": os.getcwd(),
    "path": os.environ["PYTHONPATH"], "safe": os.environ["PYTHONSAFEPATH"]}))
"""


# --- what is sent ----------------------------------------------------------------------------


def test_only_committed_code_is_sent(repository: Path) -> None:
    remote_code.refuse_uncommitted(repository)
    (repository / "README.md").write_text("other text\n")  # does not run
    remote_code.refuse_uncommitted(repository)
    (repository / "conf" / "module.py").write_text("name = 'other'\n")
    (repository / "slurm" / "new one.py").write_text("")
    git(repository, "mv", "models/module.py", "models/moved.py")
    with pytest.raises(ConfigError) as refusal:
        remote_code.refuse_uncommitted(repository)
    message = str(refusal.value)
    assert "3 uncommitted: " in message and "commit (or remove) them first" in message
    for name in ("conf/module.py", "slurm/new one.py", "models/moved.py"):
        assert name in message
    assert "models/module.py" not in message
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "second")
    remote_code.refuse_uncommitted(repository)
    assert re.fullmatch("[0-9a-f]{40}", remote_code.head(repository))


def test_what_is_no_clone_cannot_be_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="git clone"):
        remote_code.head(tmp_path)


# --- the far end -----------------------------------------------------------------------------


def archive(tmp_path: Path, repository: Path) -> tuple[Path, str]:
    path = tmp_path / "incoming"
    git(repository, "archive", "--format=tar.gz", f"--output={path}", "HEAD")
    return path, remote_host.hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_code_is_unpacked_whole_and_an_edit_is_noticed(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("code").mkdir()
    path, sha256 = archive(tmp_path, repository)
    code = tmp_path / "code" / COMMIT
    assert remote_host.state(str(code)) == "absent"
    assert remote_host.main(["unpack", str(path), "0" * 64, COMMIT, *PACKAGES]) == 1
    assert not code.exists()
    assert remote_host.main(["unpack", str(path), sha256, COMMIT, *PACKAGES]) == 0
    assert remote_host.state(str(code)) == "there" and not path.exists()
    assert sorted(entry.name for entry in code.iterdir()) == [remote_host.RECORD, *PACKAGES]
    # Running it leaves caches; those are no edit. A second sender finds it there.
    (code / "conf" / "__pycache__").mkdir()
    (code / "conf" / "__pycache__" / "module.pyc").touch()
    path, sha256 = archive(tmp_path, repository)
    assert remote_host.main(["unpack", str(path), sha256, COMMIT, *PACKAGES]) == 0
    assert remote_host.state(str(code)) == "there"
    (code / "slurm" / "added.py").touch()
    assert remote_host.state(str(code)) == "edited"


def test_an_archive_cannot_write_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("code").mkdir()
    path = tmp_path / "incoming"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("conf/../../../up.py", "/conf/root.py", "other/x.py", "conf/good.py"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("conf/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    sha256 = remote_host.hashlib.sha256(path.read_bytes()).hexdigest()
    assert remote_host.main(["unpack", str(path), sha256, COMMIT, "conf"]) == 0
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if not file.is_dir()}
    assert files == {f"code/{COMMIT}/conf/good.py", f"code/{COMMIT}/{remote_host.RECORD}"}


def test_only_some_copies_of_the_code_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(9):
        record = Path("code") / f"{number:040x}" / remote_host.RECORD
        record.parent.mkdir(parents=True)
        record.touch()
        remote_host.os.utime(record, (number, number))
    (Path("code") / "mine").mkdir()  # nothing of ours
    remote_host.prune(f"{0:040x}")
    kept = sorted(path.name for path in Path("code").iterdir())
    assert kept == [f"{number:040x}" for number in (0, 5, 6, 7, 8)] + ["mine"]


def test_the_far_end_says_what_it_has(tmp_path: Path) -> None:
    there = look(tmp_path, f"python={sys.executable}", "dir=~/far away")
    assert there["directory"] == str(tmp_path / "far away") and there["code"] == "absent"
    assert there["python"] == sys.executable and not there["missing"]
    # Watching makes no directory.
    with pytest.raises(ConfigError, match="cannot be entered"):
        look(tmp_path, "dir=~/typo", words=["verb=status"])
    assert not (tmp_path / "typo").exists()


def test_the_environment_in_the_directory_is_the_default(tmp_path: Path) -> None:
    python = tmp_path / "amalia-vl" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "Welcome to the cluster"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert look(tmp_path)["version"] == list(sys.version_info[:3])


def fake_python(home: Path, body: str) -> str:
    path = home / "bin" / "python"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"python={path}"


def answer(**changed: object) -> str:
    known = {
        "python": "/p",
        "version": [3, 11, 2],
        "missing": [],
        "directory": "/d",
        "code": "there",
    }
    return f"cat <<'.'\n{remote_host.MARK}{json.dumps({**known, **changed})}\n."


def test_a_python_that_will_not_do_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no no-such-python; give REMOTE_PYTHON="):
        look(tmp_path, "python=no-such-python")
    with pytest.raises(ConfigError, match=r"did not run \(SyntaxError: invalid"):
        look(tmp_path, fake_python(tmp_path, "echo 'SyntaxError: invalid syntax' >&2; exit 1"))
    with pytest.raises(ConfigError, match=r"is Python 3\.9\.18; give REMOTE_PYTHON="):
        look(tmp_path, fake_python(tmp_path, answer(version=[3, 9, 18])))
    with pytest.raises(ConfigError, match="lacks hydra, submitit; install"):
        look(tmp_path, fake_python(tmp_path, answer(missing=["submitit", "torch", "hydra"])))
    with pytest.raises(ConfigError, match="was edited since it was sent"):
        look(tmp_path, fake_python(tmp_path, answer(code="edited")))
    assert look(tmp_path, fake_python(tmp_path, answer(missing=["torch"])))["missing"] == {"torch"}
