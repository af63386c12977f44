"""From a laptop: send the committed code to a cluster's login node and run a verb there, over SSH.

    python -m slurm.remote host=user@host [port=22] [identity=KEY] [dir=~/amalia-vl] [python=]
        verb=submit|status|logs|cancel|steer|array WORDS...

All that follows `verb=` is given to the verb as it is, there, in `dir`, where `runs/` and `data/`
lie; so scripts are made by the same renderer, from the same Hydra configuration, on the machine
that queues them.  nemo-run packs the code (GitArchivePackager) and holds the connection
(SSHTunnel).  The code goes to `dir/code/COMMIT`, once a commit.  docs/remote.md says the rest.
"""

import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError
from conf.snapshot import PACKAGES
from slurm import command_line, remote_code, remote_host
from slurm.remote_tunnel import Host, Link, connected

VERBS = {
    "submit": "slurm.submit",
    "status": "slurm.status",
    "logs": "slurm.logs",
    "cancel": "slurm.cancel",
    "steer": "slurm.steer",
    "array": "slurm.arrays",
}
QUEUES = ("submit", "array")  # those that run the code that is sent
OPTIONS = ("host", "port", "identity", "dir", "python")
DIRECTORY = "~/amalia-vl"
ACCOUNT = {"SLURM_ACCOUNT": "cluster.account", "SLURM_QOS": "cluster.qos"}
# What submitting imports there, and what the jobs do besides, in a container or not.
SUBMITTING = ("hydra", "omegaconf", "yaml", "submitit")
TRAINING = ("torch", "megatron", "numpy", "pyarrow", "webdataset", "safetensors", "tokenizers")
PYTHONS = ((3, 11), (3, 12))
NO_DIRECTORY, NO_PYTHON = 90, 91  # exit codes of the check's shell lines
# As in the jobs: nothing from where the command runs, nothing that a module put in its way.
CLEAN = ("env", "-u", "PYTHONHOME", "-u", "PYTHONPATH", "PYTHONSAFEPATH=1", "PYTHONUNBUFFERED=1")


@dataclass(frozen=True)
class Request:
    """The command line, sorted."""

    host: Host
    directory: str
    python: str  # empty: .venv/bin/python of the directory, else python3
    verb: str
    words: tuple[str, ...]

    @property
    def follows(self) -> bool:
        """Whether the verb goes on until somebody ends it."""
        return self.verb == "logs" and any(
            re.fullmatch(r"follow=(1|true|yes|on)", word, re.IGNORECASE) for word in self.words
        )


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Request:
    """Sort the command line. Raises ConfigError.

    The account and QoS of `environment` (this process's) go along as settings, where it has them.
    """
    given = os.environ if environment is None else environment
    options: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key == "verb":
            words = tuple(arguments[position + 1 :])
            break
        if not equals or key not in OPTIONS:
            raise ConfigError(
                f"{argument!r} is none of {'=, '.join(OPTIONS)}=; what is meant for the verb "
                "follows verb="
            )
        options[key] = value
    else:
        raise ConfigError(f"no verb=; one of {', '.join(VERBS)}")
    if value not in VERBS:
        raise ConfigError(f"verb={value!r} is none of {', '.join(VERBS)}")
    if not options.get("host"):
        raise ConfigError("no host=user@host")
    if value in QUEUES:
        cluster = [word for word in words if word.startswith("cluster=")]
        if not cluster or cluster[-1] == "cluster=local":
            raise ConfigError(
                "cluster=local would train on the login node, for as long as this connection "
                "lasts; give CLUSTER=slurm or the name of the cluster"
            )
        words = (*_account(given), *words)
    host = Host.parse(options["host"], options.get("port", ""), options.get("identity", ""))
    directory = _there(options.get("dir") or DIRECTORY, given)
    return Request(host, directory, _there(options.get("python", ""), given), value, words)


def _there(path: str, environment: Mapping[str, str]) -> str:
    """A path below this home as one below the home there: the shell here has expanded its `~`."""
    home = environment.get("HOME", "").rstrip("/")
    return f"~{path.removeprefix(home)}" if home and f"{path}/".startswith(f"{home}/") else path


def _account(environment: Mapping[str, str]) -> list[str]:
    """Overrides for SLURM_ACCOUNT and SLURM_QOS, quoted for Hydra."""
    words = []
    for name, setting in ACCOUNT.items():
        if value := environment.get(name, ""):
            if not re.fullmatch(r"[\w.@+-]+", value, re.ASCII):
                raise ConfigError(f"{name}={value!r} is not the name of an account or QoS")
            words.append(f"{setting}='{value}'")
    return words


def login_shell(line: str) -> str:
    """A shell line as one that bash runs with the login's settings, whatever shell is theirs."""
    return f"exec bash -lc {shlex.quote(line)} </dev/null"


def check_command(request: Request, commit: str) -> str:
    """The shell line that asks the host what it has."""
    # "~" must stay outside the quotes, to be the home there.
    home, slash, rest = request.directory.partition("/")
    directory = (
        f'"$HOME"{slash}{shlex.quote(rest) if rest else ""}'
        if home == "~"
        else shlex.quote(request.directory)
    )
    make = f"mkdir -p {directory} && " if request.verb in QUEUES else ""
    source = Path(remote_host.__file__).read_text(encoding="utf-8")
    words = shlex.join(["-c", source, "check", commit, *SUBMITTING, *TRAINING])
    return login_shell(
        f"{make}cd {directory} && mkdir -p code || exit {NO_DIRECTORY}\n"
        f"python={shlex.quote(request.python)}\n"
        'if [ -z "$python" ]; then\n'
        '  python=python3; [ -x .venv/bin/python ] && python="$PWD/.venv/bin/python"\n'
        "fi\n"
        'case "$python" in "~/"*) python="$HOME/${python#"~/"}";; esac\n'
        f'command -v "$python" >/dev/null || {{ echo "$python" >&2; exit {NO_PYTHON}; }}\n'
        f'exec {shlex.join(CLEAN)} "$python" {words}'
    )


def verb_command(request: Request, there: Mapping[str, Any], commit: str) -> str:
    """The shell line that runs the verb, with the code of `commit` and nothing else's."""
    directory = there["directory"]
    words = shlex.join(
        [
            *CLEAN,
            f"PYTHONPATH={directory}/code/{commit}",
            there["python"],
            "-m",
            VERBS[request.verb],
            *request.words,
        ]
    )
    plain = "stty -onlcr 2>/dev/null; " if request.follows else ""
    return login_shell(f"{plain}cd {shlex.quote(directory)} && exec {words}")


def look(link: Link, request: Request, commit: str) -> dict[str, Any]:
    """What the host answers to `check`. Raises ConfigError where it cannot run the verb."""
    said = link.ask(check_command(request, commit))
    where = f"{link.host}:{request.directory}"
    if said.code == NO_DIRECTORY:
        raise ConfigError(f"{where} cannot be entered ({said.last_line}); give REMOTE_DIR=")
    if said.code == NO_PYTHON:
        raise ConfigError(
            f"{link.host} has no {said.last_line}; give REMOTE_PYTHON=, an interpreter with this "
            "project's requirements (docs/remote.md)"
        )
    answers = [line for line in said.out.splitlines() if line.startswith(remote_host.MARK)]
    if said.code or not answers:
        raise ConfigError(
            f"{request.python or 'Python'} of {link.host} did not run ({said.last_line}); give "
            "REMOTE_PYTHON=, Python 3.11 or 3.12 with this project's requirements"
        )
    there: dict[str, Any] = loads(answers[-1].removeprefix(remote_host.MARK))
    there["missing"] = set(there["missing"])
    version = ".".join(map(str, there["version"]))
    if tuple(there["version"][:2]) not in PYTHONS:
        raise ConfigError(
            f"{there['python']} of {link.host} is Python {version}; give REMOTE_PYTHON=, Python "
            "3.11 or 3.12 with this project's requirements"
        )
    missing = [name for name in SUBMITTING if name in there["missing"]]
    if missing:
        raise ConfigError(
            f"{there['python']} of {link.host} lacks {', '.join(missing)}; install this project's "
            "requirements there (docs/remote.md), or give another REMOTE_PYTHON="
        )
    if there["code"] == "edited":
        raise ConfigError(
            f"{link.host}:{there['directory']}/code/{commit} was edited since it was sent; remove "
            "it there, and it will be sent again"
        )
    return there


def send(link: Link, there: Mapping[str, Any], commit: str) -> None:
    """Bring the code of `commit` to the host. Raises ConfigError, OSError."""
    with tempfile.TemporaryDirectory(prefix="amalia-vl-") as folder:
        package = remote_code.package(commit, Path(folder))
        incoming = f"code/.incoming-{secrets.token_hex(8)}"
        link.put(package.path, f"{there['directory']}/{incoming}")
    source = Path(remote_host.__file__).read_text(encoding="utf-8")
    words = [*CLEAN, there["python"], "-c", source, "unpack"]
    words += [incoming, package.sha256, commit, *PACKAGES]
    line = f"cd {shlex.quote(there['directory'])} && exec {shlex.join(words)}"
    said = link.ask(login_shell(line), seconds=300)
    if said.code:
        raise ConfigError(f"{link.host} could not unpack the code: {said.last_line}")
    print(f"{link.host}: code {commit[:12]} sent, {package.size / 1000:.0f} kB")


def run(request: Request) -> int:
    """Do what the request asks; returns the verb's exit code. Raises ConfigError, OSError."""
    commit = remote_code.head()
    if request.verb in QUEUES:
        remote_code.refuse_uncommitted()
    with connected(request.host) as link:
        there = look(link, request, commit)
        training = [name for name in TRAINING if name in there["missing"]]
        if training and request.verb in QUEUES:
            print(
                f"note: {there['python']} of {link.host} lacks {', '.join(training)}, which jobs "
                "need unless they run in a container or with another cluster.python",
                file=sys.stderr,
            )
        if there["code"] == "absent":
            send(link, there, commit)
        sys.stdout.flush()
        return link.stream(verb_command(request, there, commit), terminal=request.follows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(
        lambda given: run(parse(given)),
        arguments,
        __doc__,
        interrupted="interrupted; what was begun there may go on, `make status` tells",
    )


if __name__ == "__main__":
    sys.exit(main())
