"""One SSH connection to a host, by nemo-run's SSHTunnel, that trusts no unknown host.

SSHTunnel by itself accepts any host key that it has not seen (fabric's default), and ends the
process where it cannot log in.  Here a host must be in known_hosts, jump hosts as well, and every
failure is one line.  nemo-run is imported when a connection is made, no sooner.
"""

import getpass
import logging
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema.errors import ConfigError

CONNECT_SECONDS = 15
LOGIN_SECONDS = 300  # room to type a password and a token
ALIVE_SECONDS = 30
NO_KEYS = "No authentication methods available"  # paramiko's words
GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Host:
    """Where to connect; what is None comes from ~/.ssh/config, as for ssh."""

    name: str
    user: str | None = None
    port: int | None = None
    identity: str | None = None

    @classmethod
    def parse(cls, text: str, port: str = "", identity: str = "") -> "Host":
        """From `user@host` or a name of ~/.ssh/config. Raises ConfigError."""
        user, at, name = text.rpartition("@")
        # Both reach the shell line of a ProxyCommand in ~/.ssh/config.
        if not _NAME.fullmatch(name) or (at and not _USER.fullmatch(user)):
            raise ConfigError(f"host={text!r} is not user@host")
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(f"port={port!r} is not a port number")
        if identity and not Path(identity).expanduser().is_file():
            raise ConfigError(f"identity={identity}: there is no such key file")
        key = str(Path(identity).expanduser()) if identity else None
        return cls(name, user or None, int(port) if port else None, key)

    def __str__(self) -> str:
        return f"{self.user}@{self.name}" if self.user else self.name


@dataclass
class Said:
    """What a remote command said, and its exit code."""

    out: str
    err: str
    code: int

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"


class Link:
    """An open connection."""

    def __init__(self, host: Host, tunnel: Any) -> None:
        self.host, self._tunnel = host, tunnel

    def ask(self, command: str, seconds: int = 60) -> Said:
        """Run a short command and keep what it says. Raises ConfigError when it takes longer."""
        result = self._run(command, hide=True, timeout=seconds)
        return Said(result.stdout, result.stderr, int(result.exited))

    def stream(self, command: str, terminal: bool = False) -> int:
        """Run a command, passing on what it says as it comes; returns its exit code.

        With `terminal` the command ends when this connection does, else it runs to its own end.
        """
        return int(self._run(command, hide=False, pty=terminal).exited)

    def _run(self, command: str, **how: Any) -> Any:
        import paramiko
        from invoke.exceptions import CommandTimedOut, ThreadException

        lost: object = "it ended without an exit code"
        try:
            result = self._tunnel.run(command, warn=True, encoding="utf-8", **how)
            if result.exited >= 0:
                return result
        except CommandTimedOut as error:
            raise ConfigError(
                f"{self.host} has not answered for {how['timeout']} s; look whether its file "
                "system hangs"
            ) from error
        except ThreadException as error:
            if any(thread.type is BrokenPipeError for thread in error.exceptions):  # `| head`
                raise BrokenPipeError from error
            lost = error.exceptions[0].value
        except (paramiko.SSHException, EOFError, OSError) as error:
            lost = _reason(error)
        raise ConfigError(
            f"the connection to {self.host} was lost ({lost}), and what was begun there may go "
            "on; look with `make status`, and give the same command again"
        )

    def put(self, source: Path, target: str) -> None:
        """Copy a file there, by SFTP. Raises ConfigError, OSError."""
        import paramiko

        try:
            self._tunnel.put(str(source), target)
        except (paramiko.SSHException, EOFError) as error:
            raise ConfigError(f"{self.host} takes no files by SFTP ({_reason(error)})") from error


@contextmanager
def connected(host: Host) -> Iterator[Link]:
    """An open connection for the length of a block. Raises ConfigError saying why there is none."""
    tunnel = _tunnel(host)
    try:
        tunnel.connect()
        yield Link(host, tunnel)
    finally:
        tunnel.cleanup()


def _tunnel(host: Host) -> Any:
    try:
        import fabric
        import paramiko
        from nemo_run.core.tunnel.client import SSHTunnel
    except ImportError as error:
        raise ConfigError(
            f"nemo-run cannot be imported here ({error}); run `make setup-remote`"
        ) from error
    # It writes tracebacks of what is caught below to the terminal.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)

    class Reject(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            name, port = (hostname.strip("[]").split("]:") + ["22"])[:2]
            raise ConfigError(
                f"the host key of {name} is not known here ({key.get_name()} {key.fingerprint}); "
                f"compare it with the one that the site publishes, then log in once by hand with "
                f"`ssh -p {port} {name}`, or add it with `ssh-keyscan -p {port} {name} "
                ">> ~/.ssh/known_hosts`"
            )

    class AskingTransport(paramiko.Transport):  # type: ignore[misc]
        def auth_interactive_dumb(
            self, username: str, handler: Any = None, submethods: str = ""
        ) -> Any:
            """The site's questions, also those after an accepted key; paramiko's own way echoes."""
            if not sys.stdin.isatty():
                raise paramiko.AuthenticationException("it asks questions, and nobody is here")
            return super().auth_interactive_dumb(username, _answer, submethods)

    class StrictTunnel(SSHTunnel):  # type: ignore[misc]
        session: Any

        def connect(self) -> None:
            if self.session is not None and self.session.is_connected:
                return
            session: Any
            keys: dict[str, Any] = {"key_filename": [self.identity]} if self.identity else {}
            session = self.session = fabric.Connection(
                self.host,
                user=self.user or None,
                port=self.port,
                connect_timeout=CONNECT_SECONDS,
                connect_kwargs={
                    **keys,
                    "auth_timeout": LOGIN_SECONDS,
                    "transport_factory": AskingTransport,
                },
                forward_agent=False,
                config=fabric.Config(overrides={"run": {"in_stream": False}}),
            )
            connection = session
            while isinstance(connection, fabric.Connection):  # the jump hosts as well
                connection.client.set_missing_host_key_policy(Reject())
                for path in _known_hosts(connection.ssh_config):
                    connection.client.load_system_host_keys(str(path))
                connection = connection.gateway
            try:
                session.open()
            except paramiko.BadHostKeyException as error:
                raise ConfigError(
                    f"the host key of {error.hostname} is not the one in known_hosts; somebody "
                    "may be listening. Ask the site before you remove the old one with "
                    f"`ssh-keygen -R {error.hostname}`"
                ) from error
            except paramiko.AuthenticationException as error:
                self._log_in(error)
            except (paramiko.SSHException, OSError, EOFError) as error:
                if str(error) != NO_KEYS:
                    raise ConfigError(
                        f"{host} cannot be reached: {_reason(error)}; is `ssh {host}` possible "
                        "from here?"
                    ) from error
                self._log_in(error)
            session.transport.set_keepalive(ALIVE_SECONDS)

        def _log_in(self, error: Exception) -> None:
            """Ask for a password and a token, as SSHTunnel does, where there is somebody to ask."""
            transport = self.session.client.get_transport()
            refusal = ConfigError(
                f"{self.session.host} refuses to log {self.session.user} in ({_reason(error)}); "
                "give identity=KEYFILE, load the key with `ssh-add`, or run this in a terminal to "
                "be asked for password and token"
            )
            if not sys.stdin.isatty() or transport is None or not transport.is_active():
                raise refusal from error
            try:
                try:
                    transport.auth_interactive_dumb(self.session.user)
                except paramiko.BadAuthenticationType:
                    transport.auth_password(self.session.user, self.fallback_auth_handler())
            except (paramiko.SSHException, EOFError) as second:
                raise refusal from second
            self.session.transport = transport

    return StrictTunnel(
        host=host.name, user=host.user or "", port=host.port, identity=host.identity, job_dir=""
    )


def _answer(title: str, instructions: str, questions: list[tuple[str, bool]]) -> list[str]:
    for text in (title, instructions):
        if text.strip():
            print(text.strip(), file=sys.stderr)
    return [input(text) if echo else getpass.getpass(text) for text, echo in questions]


def _known_hosts(ssh_config: Any) -> list[Path]:
    """Files of known host keys that ssh would read, those that exist."""
    user = shlex.split(ssh_config.get("userknownhostsfile", "~/.ssh/known_hosts"))
    site = shlex.split(ssh_config.get("globalknownhostsfile", GLOBAL_KNOWN_HOSTS))
    paths = [Path(name).expanduser() for name in user + site]
    return [path for path in paths if path.is_file()]


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return f"its name does not resolve ({error.strerror})"
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_SECONDS} s"
    return " ".join(str(error).split())[:300] or type(error).__name__
