"""final=true: the gate runs before the rename, and nothing gets the final name without it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.dying import status
from tests.tools.parity.test_gate import change_json, in_process, stage  # noqa: F401
from tools import hf_export, parity_gate
from tools.command import run
from tools.parity import network
from tools.parity_gate import CERTIFICATE, certified


def exporting(source: Path, out: Path) -> int:
    return run(hf_export.main, [f"stage={source}", f"out={out}", "final=true"])


def dying(module: Any, name: str, action: Callable[[], int]) -> int:
    """Exit status of `action` in a child that is killed when it comes to a function."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_child() -> int:
        setattr(module, name, die)
        return action()

    return status(in_child)


@pytest.mark.usefixtures("in_process")
def test_killed_in_the_gate_it_is_not_final_and_goes_on(
    stage: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, aside = tmp_path / "hf", tmp_path / ".hf.partial"
    assert dying(network, "_run", lambda: exporting(stage, out)) == -signal.SIGKILL
    assert not out.exists() and not certified(aside)
    capsys.readouterr()
    assert exporting(stage, out) == 0
    assert "whole already" in capsys.readouterr().out
    assert certified(out)
    certificate = json.loads((out / CERTIFICATE).read_text())
    assert all(finding["passed"] for finding in certificate["findings"])
    assert CERTIFICATE not in (out / "SHA256SUMS").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    # The same files as without the gate, and the certificate.
    plain = {path.name: path.read_bytes() for path in (stage.parent / "hf").iterdir()}
    final = {path.name: path.read_bytes() for path in out.iterdir()}
    assert final == {**plain, CERTIFICATE: final[CERTIFICATE]}


@pytest.mark.usefixtures("in_process")
def test_fault_leaves_nothing_under_the_final_name(
    stage: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "hf"
    original = hf_export._write_small_files

    def forgets_theta(*arguments: Any) -> None:
        original(*arguments)
        change_json(arguments[-1] / "config.json", lambda c: c["text_config"].pop("rope_theta"))

    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "_write_small_files", forgets_theta)
        assert exporting(stage, out) == 1
    said = capsys.readouterr().err
    assert f"is NOT the model of {stage}: settings, " in said
    assert f"there is no {out}, its files stay in {tmp_path / '.hf.partial'}" in said
    assert not out.exists() and not certified(tmp_path / ".hf.partial")


def test_certificate_of_a_kill_is_not_taken_over(stage: Path, tmp_path: Path) -> None:  # noqa: F811
    """Killed between certificate and rename, then exported without the gate: not certified."""
    out = tmp_path / "hf"

    def certify_and_die() -> int:
        def certify(_: Path, export: Path, *__: Any) -> None:
            (export / CERTIFICATE).write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)

        parity_gate.certify = certify  # type: ignore[assignment]
        return exporting(stage, out)

    assert status(certify_and_die) == -signal.SIGKILL
    assert (tmp_path / ".hf.partial" / CERTIFICATE).is_file()
    assert run(hf_export.main, [f"stage={stage}", f"out={out}"]) == 0
    assert not (out / CERTIFICATE).exists()
    assert CERTIFICATE not in (out / "SHA256SUMS").read_text()


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"format": 1}', "\0"])
def test_certificate_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    (tmp_path / CERTIFICATE).write_text(text)
    assert not certified(tmp_path)
