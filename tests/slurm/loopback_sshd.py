"""A private sshd on loopback, and a laptop's home that knows it: nobody's ~/.ssh is touched."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-remote" / "bin" / "python"
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])


def lacking() -> str:
    """Why nothing can be sent over SSH here, or ""."""
    missing = [n for n in ("sshd", "ssh-keygen", "git") if shutil.which(n, path=_SEARCH) is None]
    if missing:
        return f"no sshd on this machine: {', '.join(missing)} not found"
    if not PYTHON.exists():
        return f"no nemo-run here: {PYTHON} not found; `make setup-remote` makes it"
    return ""


class LoopbackSshd:
    """sshd with its own port, host key and authorized key, for the user who runs this.

    `home` is the laptop's home, whose .ssh/known_hosts holds the host key; `directory` is the
    REMOTE_DIR of the far end.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # sshd refuses keys in folders that others may write, as pytest's may be.
        self.root = Path(tempfile.mkdtemp(prefix="sshd-", dir="/tmp"))
        self.home, self.directory = self.root / "laptop", self.root / "cluster"
        (self.home / ".ssh").mkdir(parents=True)
        (self.home / ".ssh").chmod(0o700)
        self.directory.mkdir()
        self.identity = self.home / ".ssh" / "id_ed25519"
        self.known_hosts = self.home / ".ssh" / "known_hosts"
        self.environment = dict(environment)
        self.user = getpass.getuser()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LoopbackSshd:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        host_key = self.root / "host_key"
        for key in (host_key, self.identity):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        shutil.copy(f"{self.identity}.pub", self.root / "authorized_keys")
        public = Path(f"{host_key}.pub").read_text(encoding="utf-8").split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {' '.join(public)}\n")
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # sshd's chroot; it stays empty
        settings = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        config = self.root / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {host_key}\n"
            f"AuthorizedKeysFile {self.root}/authorized_keys\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin prohibit-password\nStrictModes no\n"
            "Subsystem sftp internal-sftp\n" + (f"SetEnv {settings}\n" if settings else "")
        )
        sshd = shutil.which("sshd", path=_SEARCH)
        assert sshd is not None
        self._daemon = subprocess.Popen(
            [sshd, "-D", "-f", str(config), "-E", str(self.root / "log")],
            stdin=subprocess.DEVNULL,
        )
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < end and self._daemon.poll() is None, self.log()
                time.sleep(0.05)

    def stop(self) -> None:
        """End sshd and remove its directory."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(timeout=10)
        shutil.rmtree(self.root, ignore_errors=True)

    def log(self) -> str:
        path = self.root / "log"
        return path.read_text(errors="replace") if path.exists() else "sshd wrote no log"

    def laptop(self) -> dict[str, str]:
        """Environment of a command on the laptop: no Slurm, no agent, a home of its own."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SSH_", "GIT_")) and name != "PYTHONPATH"
        }
        return {**kept, "HOME": str(self.home), "PATH": os.defpath}

    def words(
        self, *words: str, python: str = sys.executable, options: Mapping[str, str] | None = None
    ) -> list[str]:
        """The command line of slurm.remote for this host."""
        given = {
            "host": f"{self.user}@127.0.0.1",
            "port": str(self.port),
            "dir": str(self.directory),
            "python": python,
            **(options or {}),
        }
        return [
            *(str(PYTHON), "-m", "slurm.remote"),
            *(f"{name}={value}" for name, value in given.items()),
            *words,
        ]

    def remote(
        self,
        *words: str,
        python: str = sys.executable,
        options: Mapping[str, str] | None = None,
        repository: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run slurm.remote of `repository` on the laptop."""
        return subprocess.run(
            self.words(*words, python=python, options=options),
            cwd=repository,
            env={**self.laptop(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def _run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, timeout=30)
