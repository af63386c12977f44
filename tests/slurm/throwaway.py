"""A private real Slurm in one directory: started in half a second, gone without a trace.

    python -m tests.slurm.throwaway DIR [--accounting]     # start one and print what to export
    python -m tests.slurm.throwaway DIR --stop

Nodes cpu1..cpu4 are in the default partition `cpu` (8 cores, no GPUs), acc1 and acc2 in `acc` (80
cores and 4 fake GPUs each). munge, ports, users and logs are its own: any number run side by
side and the machine's own Slurm, if there is one, is not touched.

As root each slurmd has a mount and a UTS namespace of its own, so that inside a job `hostname` is
the node's name and every node's name resolves (to this machine), as on a cluster. As an ordinary
user, or where namespaces are forbidden, the nodes' names do not resolve: also a case to test.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from tests.slurm import processes, throwaway_files

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")
ACCOUNTING_PROGRAMS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb")
# States in which a job is over.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED "
    "TIMEOUT".split()
)
_NODE = "THROWAWAY_NODE"  # in the environment of a slurmd and of its slurmstepds
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd")
_PREFIX, _OWNER = "slurm-", "owner"  # of temporary directories; who started one
_SEARCH = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on every user's PATH


def lacking(accounting: bool = False, user: str | None = None) -> str:
    """Why no throw-away Slurm can be had here, or ""."""
    wanted = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    missing = [name for name in wanted if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no Slurm on this machine: {', '.join(missing)} not found"
    if user is not None and user != _current_user():
        if os.geteuid() != 0:
            return f"only root can start a Slurm as {user}"
        with contextlib.suppress(KeyError):
            pwd.getpwnam(user)
            return ""
        return f"no user {user!r} on this machine"
    return ""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *_SEARCH])


def _current_user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


class ThrowAwaySlurm:
    """One Slurm; a context manager.

    `user` runs every daemon and command (root only; default: who runs this). `options` replace or
    add keys of slurm.conf. Without `directory` it lies in a new one under /tmp, which `stop`
    removes. With `outlive` the daemons stay when this process ends.
    """

    def __init__(
        self,
        directory: Path | None = None,
        accounting: bool = False,
        user: str | None = None,
        cpu_nodes: int = 4,
        acc_nodes: int = 2,
        options: Mapping[str, str] | None = None,
        outlive: bool = False,
    ) -> None:
        self.accounting = accounting
        self.user = user or _current_user()
        self.outlive = outlive
        self.options = dict(options or {})
        self.nodes = [f"cpu{number + 1}" for number in range(cpu_nodes)]
        self.nodes += [f"acc{number + 1}" for number in range(acc_nodes)]
        self._remove = directory is None
        if self._remove:
            _sweep()
        # Sockets' paths may have 107 characters, so not in pytest's deep directories; and those are
        # closed to other users.
        self.directory = directory or Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self.directory = self.directory.resolve()
        if self._remove:
            (self.directory / _OWNER).write_text(processes.identity(os.getpid()))
        if len(str(self.directory)) > 80:
            raise ValueError(f"{self.directory} is too long for sockets inside it; give a shorter")
        self.env = self._environment()
        self.namespaces = False
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # --- starting and stopping ---------------------------------------------------------------

    def __enter__(self) -> ThrowAwaySlurm:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, attempts: int = 3) -> ThrowAwaySlurm:
        """Start every daemon and wait until all nodes are idle. RuntimeError with the logs."""
        reason = lacking(self.accounting, self.user)
        if reason:
            raise RuntimeError(reason)
        for attempt in range(attempts):
            try:
                self._start()
                return self
            except (AssertionError, subprocess.SubprocessError, OSError) as error:
                # Another process may have taken one of the ports that were free before.
                logs = self.log_tails()
                self._kill_all()
                if attempt == attempts - 1:
                    self.stop()
                    raise RuntimeError(f"Slurm did not start: {error}\n{logs}") from error
        raise AssertionError("not reached")

    def stop(self) -> None:
        """Kill every process of it, also jobs; remove the directory if it is a temporary one."""
        self._kill_all()
        if self._remove:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self) -> None:
        for name in ("log", "state", "spool", "run", "munge", "mysql"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).mkdir(parents=True)
        for node in self.nodes:
            (self.directory / "spool" / node).mkdir()
        self.directory.chmod(0o755)
        (self.directory / "munge").chmod(0o700)
        key = self.directory / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, database, *rest = throwaway_files.free_ports(2 + len(self.nodes))
        files = {
            "slurm.conf": throwaway_files.slurm_conf(
                self.directory,
                self.user,
                controller,
                dict(zip(self.nodes, rest, strict=True)),
                database if self.accounting else None,
                self.options,
            ),
            "gres.conf": throwaway_files.gres_conf(self.nodes),
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "hosts": throwaway_files.hosts(self.nodes),
        }
        if self.accounting:
            files["slurmdbd.conf"] = throwaway_files.slurmdbd_conf(
                self.directory, self.user, database
            )
        for name, text in files.items():
            (self.directory / name).write_text(text, encoding="utf-8")
            (self.directory / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)
        self._give_away()
        self.namespaces = os.geteuid() == 0 and self.user == "root" and _may_unshare()

        run = self.directory / "run"
        run.chmod(0o755)
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}"),
            *(f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"),
            *(f"--log-file={self.directory}/log/munged.log", f"--seed-file={run}/munge.seed"),
        )
        _until(lambda: (run / "munge.sock").exists(), 10, "munged made no socket")
        if self.accounting:
            self._start_database()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start_node(node)
        _until(self._all_idle, 30, "the nodes did not become idle")
        if self.accounting:
            # The resource gres/gpu is known only since slurmctld has registered.
            self._sacctmgr("modify qos acc_debug set MaxTRESPerUser=gres/gpu=8")

    def _start_database(self) -> None:
        data, socket = self.directory / "mysql", self.directory / "run" / "mysql.sock"
        small = ("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M")
        self.run(
            *("mariadb-install-db", f"--user={self.user}", f"--datadir={data}", "--no-defaults"),
            *("--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"),
            *small,
            timeout=120,
        )
        self._daemon(
            "mariadbd",
            *("mariadbd", "--no-defaults", f"--user={self.user}", f"--datadir={data}"),
            *(f"--socket={socket}", "--skip-networking", "--performance-schema=off"),
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"),
            *("--innodb-lock-wait-timeout=900", *small),
        )
        grants = (
            "create database slurm_acct_db; create user slurm@localhost identified by 'slurm'; "
            "grant all on slurm_acct_db.* to slurm@localhost"
        )
        client = ("mariadb", "--no-defaults", f"--socket={socket}", "-uroot", "-e")
        _until(lambda: self._succeeds(*client, "select 1"), 30, "mariadbd does not answer")
        self.run(*client, grants)
        self._daemon("slurmdbd", "slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(socket)})
        show = ("sacctmgr", "--noheader", "show", "cluster")
        _until(lambda: self._succeeds(*show), 60, "slurmdbd does not answer")
        qos, account = throwaway_files.ALL_QOS, throwaway_files.ACCOUNT
        self._sacctmgr(
            f"add cluster {throwaway_files.CLUSTER_NAME}",
            *throwaway_files.QOS_COMMANDS,
            f"add user {self.user} account={account} qos={qos} defaultqos=acc_ehpc",
            f"modify user {self.user} set defaultaccount={account}",
        )

    def _sacctmgr(self, *commands: str) -> None:
        for command in commands:
            self.run("sacctmgr", "--immediate", "--quiet", *command.split())

    def _start_node(self, node: str) -> None:
        words = ["slurmd", "-D", "-N", node]
        if self.namespaces:
            mount = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
            inside = ["sh", "-c", mount, "sh", str(self.directory / "hosts"), node]
            words = ["unshare", "--mount", "--uts", *inside, *words]
        self._daemon(f"slurmd.{node}", *words, environment={_NODE: node})

    def _daemon(self, name: str, *words: str, environment: Mapping[str, str] | None = None) -> None:
        with open(self.directory / "log" / f"{name}.start", "wb") as log:
            self.daemons[name] = subprocess.Popen(
                self._as_user(words, daemon=True),
                cwd=self.directory,
                env={**self.env, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _as_user(self, words: Sequence[str], daemon: bool = False) -> list[str]:
        prefix: list[str] = []
        if self.user != _current_user():
            entry = pwd.getpwnam(self.user)
            prefix += [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
        if daemon and not self.outlive:  # however this process ends
            prefix += ["--pdeathsig=KILL"]
        return ["setpriv", *prefix, "--", *words] if prefix else list(words)

    def _give_away(self) -> None:
        if self.user != _current_user():
            entry = pwd.getpwnam(self.user)
            for path in [self.directory, *self.directory.rglob("*")]:
                os.chown(path, entry.pw_uid, entry.pw_gid)

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_"))
        }
        if self.user != _current_user():
            kept |= {"HOME": str(self.directory), "USER": self.user, "LOGNAME": self.user}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.directory / "slurm.conf")}

    def _kill_all(self) -> None:
        # Daemons first, or they would start or requeue what is killed.
        processes.kill(self._own(daemons=True))
        for _ in range(5):
            left = self._own(daemons=False)
            if not left:
                break
            processes.kill(left)
        for process in self.daemons.values():
            process.wait(timeout=10)
        self.daemons.clear()

    def _own(self, daemons: bool) -> list[int]:
        """Processes of this Slurm: its daemons, or whatever a job left as well.

        A shell in which somebody exported SLURM_CONF is neither.
        """
        conf, here = str(self.directory / "slurm.conf"), {os.getpid(), os.getppid()}
        found: list[int] = []
        for pid in processes.pids():
            environment = processes.environment(pid)
            if environment.get("SLURM_CONF") != conf or pid in here:
                continue
            name = Path(processes.command(pid).partition(" ")[0]).name
            is_daemon = name.rstrip(":") in (
                "munged",
                "slurmctld",
                "slurmd",
                "slurmdbd",
                "mariadbd",
            )
            job = "SLURM_JOB_ID" in environment or _NODE in environment or name == "slurmstepd:"
            if is_daemon or (job and not daemons):
                found.append(pid)
        known = {process.pid for process in self.daemons.values() if process.poll() is None}
        return sorted({*found, *known})

    # --- commands ----------------------------------------------------------------------------

    def run(
        self,
        *words: str,
        check: bool = True,
        timeout: float = 60,
        stdin: str | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run one command against this Slurm. AssertionError with its output when it fails."""
        done = subprocess.run(
            self._as_user(words),
            cwd=cwd or self.directory,
            env={**self.env, **(env or {})},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            said = f"{done.stdout}{done.stderr}"
            assert done.returncode == 0, f"{' '.join(words)}: exit code {done.returncode}: {said}"
        return done

    def _succeeds(self, *words: str) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.run(*words, check=False, timeout=5).returncode == 0
        return False

    def sbatch(self, *words: str, wrap: str | None = None, **keywords: object) -> str:
        """Submit; the job's id. `wrap` is a shell line; keywords go to `run`.

        Without an --output of its own its log is `directory/out/slurm-ID.out`, see `output`.
        """
        out = self.directory / "out"
        if not out.exists():
            out.mkdir()
            self._give_away()
        line = ["--wrap", wrap] if wrap is not None else []
        output = "%A_%a" if any(word.startswith(("--array", "-a")) for word in words) else "%j"
        standard = [f"--output={out}/slurm-{output}.out", "--parsable"]
        done = self.run("sbatch", *standard, *line, *words, **keywords)  # type: ignore[arg-type]
        return done.stdout.strip().partition(";")[0]

    def output(self, job_id: str) -> str:
        """What a job submitted with `sbatch` has printed until now."""
        path = self.directory / "out" / f"slurm-{job_id}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job` (JobState, Restarts, Reason, Dependency, ...)."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout
        pairs = (word.partition("=") for word in text.split() if "=" in word)
        return {name: value for name, _, value in pairs}

    def state(self, job_id: str) -> str:
        """State of a job, such as RUNNING."""
        return self.job(job_id)["JobState"]

    def wait(self, job_id: str, states: Collection[str] | str = ENDED, timeout: float = 60) -> str:
        """Wait until the job is in one of `states`; which. AssertionError with the logs."""
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + timeout
        while (state := self.state(job_id)) not in wanted:
            if time.monotonic() > end or (state in ENDED and not wanted & ENDED):
                raise AssertionError(
                    f"job {job_id} is {state}, not {sorted(wanted)}\n{self.job(job_id)}\n"
                    f"{self.output(job_id)}\n{self.log_tails()}"
                )
            time.sleep(0.1)
        return state

    def job_ids(self, all_states: bool = False) -> list[str]:
        """Jobs that are queued or run (or every one that the controller remembers)."""
        states = ["--states=all"] if all_states else []
        return self.run("squeue", "--noheader", "--format=%i", *states).stdout.split()

    def cancel_all(self, timeout: float = 120) -> None:
        """Cancel every job and wait until none is left."""
        if self.job_ids():
            self.run("scancel", f"--user={self.user}")
            _until(lambda: not self.job_ids(), timeout, "jobs stay in the queue")

    # --- nodes -------------------------------------------------------------------------------

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo names it: idle, mixed, allocated, down, drained, ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)  # type: ignore[misc]

    def _all_idle(self) -> bool:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            states = self.node_states()
            return len(states) == len(self.nodes) and set(states.values()) == {"idle"}
        return False

    def node_pids(self, node: str) -> dict[str, list[int]]:
        """`slurmd`, `stepds` and `jobs` (all processes of jobs) of a node."""
        conf = str(self.directory / "slurm.conf")
        found: dict[str, list[int]] = {"slurmd": [], "stepds": [], "jobs": []}
        for pid in processes.pids():
            environment = processes.environment(pid)
            if environment.get("SLURM_CONF") != conf:
                continue
            if environment.get("SLURMD_NODENAME") == node and "SLURM_JOB_ID" in environment:
                found["jobs"].append(pid)
            elif environment.get(_NODE) == node:
                is_step = processes.command(pid).startswith("slurmstepd")
                found["stepds" if is_step else "slurmd"].append(pid)
        return found

    def kill_node(self, node: str, stepds: bool = True, jobs: bool = True) -> None:
        """kill -9 its slurmd and, unless told otherwise, its slurmstepds and jobs' processes.

        Slurm notices after SlurmdTimeout. Without `jobs` orphans carry on, as on a node that has
        lost only its network or its daemon.
        """
        found = self.node_pids(node)
        assert found["slurmd"], f"no slurmd of {node} runs"
        chosen = found["slurmd"] + found["stepds"] * stepds + found["jobs"] * jobs
        processes.kill(chosen)
        self.daemons[f"slurmd.{node}"].wait(timeout=10)

    def restart_node(self, node: str) -> None:
        """Start its slurmd again and wait until the node serves."""
        daemon = self.daemons.get(f"slurmd.{node}")
        if daemon is None or daemon.poll() is not None:
            self._start_node(node)
        if self.node_states()[node].rstrip("*").startswith(("down", "drain")):
            self.update_node(node, "resume")
        serving = ("idle", "mixed", "allocated", "completing")
        _until(lambda: self.node_states()[node] in serving, 60, f"{node} does not come back")

    def update_node(self, node: str, state: str, reason: str = "test") -> None:
        """scontrol update of its state: down, drain, resume, ... ."""
        because = [] if state == "resume" else [f"reason={reason}"]
        words = ("scontrol", "update", f"nodename={node}", f"state={state}", *because)
        # A node that has come back by itself (ReturnToService) cannot be resumed.
        self.run(*words, check=state != "resume")

    def clean(self) -> None:
        """As at the beginning: no jobs, every node idle."""
        self.cancel_all()
        for node, state in self.node_states().items():
            gone = self.daemons[f"slurmd.{node}"].poll() is not None
            if gone or state.rstrip("*") not in ("idle", "completing"):
                self.restart_node(node)
        _until(self._all_idle, 60, "the nodes do not become idle")

    # --- what happened -----------------------------------------------------------------------

    def log_tails(self, lines: int = 12) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(self._tails(lines))

    def _tails(self, lines: int) -> Iterator[str]:
        for path in sorted((self.directory / "log").glob("*")):
            if path.suffix == ".start" and path.with_suffix(".log").exists():
                continue  # the same once more
            text = path.read_text(encoding="utf-8", errors="replace")
            tail = [line for line in text.splitlines() if "pmi" not in line][-lines:]
            if tail:
                yield "\n".join([f"--- {path.name}", *tail])


def _sweep() -> None:
    """End and remove what is left of test runs that were killed."""
    for owner in Path("/tmp").glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            text = owner.read_text(encoding="utf-8")
            if text and processes.identity(int(text.split()[0])) != text:
                abandoned = ThrowAwaySlurm(owner.parent)
                abandoned._remove = True
                abandoned.stop()


def _may_unshare() -> bool:
    words = ["unshare", "--mount", "--uts", "true"]
    return subprocess.run(words, capture_output=True, timeout=10).returncode == 0


def _until(condition: Callable[[], bool], timeout: float, message: str) -> None:
    """Poll until `condition()` is true. AssertionError with `message`."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--accounting", action="store_true")
    parser.add_argument("--stop", action="store_true")
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    conf = directory / "slurm.conf"
    if directory.exists() and any(directory.iterdir()) and not conf.exists():
        print(f"error: {directory} holds other things; give a new directory", file=sys.stderr)
        return 1
    directory.mkdir(parents=True, exist_ok=True)
    slurm = ThrowAwaySlurm(directory, accounting=arguments.accounting, outlive=True)
    slurm.stop()
    if not arguments.stop:
        try:
            slurm.start()
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"export SLURM_CONF={slurm.directory / 'slurm.conf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
