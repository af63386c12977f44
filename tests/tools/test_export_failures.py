"""What fails in one of an export's threads ends the whole of it, soon, and is said."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.manifest import CheckpointError
from tests.tools.weights import read_weights
from tools import export_weights, hf_export
from tools.safetensors_stream import Abandoned, SafetensorsWriter, TensorSpec

LIMIT_S = 60


@pytest.fixture
def request_(run_directory: Path, tmp_path: Path) -> hf_export.Request:
    return hf_export.Request(run_directory / "import", tmp_path / "hf", shard_bytes=60_000)


def in_time(action: Callable[[], object]) -> BaseException | None:
    """What `action` raises, in a thread of its own; AssertionError where it hangs."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    return raised[0] if raised else None


def nothing_open(folder: Path) -> bool:
    """Whether this process has no file of `folder` open, removed ones among them."""
    links = Path("/proc/self/fd")
    opened = [os.readlink(link) for link in links.iterdir() if link.is_symlink()]
    return not [name for name in opened if name.startswith(str(folder))]


@pytest.mark.parametrize("at", [1, 40, 90])
def test_thread_that_copies(
    request_: hf_export.Request, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    calls = iter(range(10_000))
    original = export_weights.convert

    def breaks(*arguments: Any) -> torch.Tensor:
        if next(calls) == at:
            raise ValueError("no such number")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(export_weights, "convert", breaks)
        error = in_time(lambda: hf_export.export(request_))
    assert isinstance(error, ValueError) and "no such number" in str(error)
    del error
    assert not request_.out.exists() and nothing_open(request_.out.parent)
    hf_export.export(request_)
    assert nothing_open(request_.out.parent)


@pytest.mark.parametrize("breaking", ["finish", "fsync", "preadv"])
def test_thread_that_finishes_while_others_write(
    request_: hf_export.Request, monkeypatch: pytest.MonkeyPatch, breaking: str
) -> None:
    def breaks(*_: Any) -> str:
        raise OSError(5, "Input/output error")

    original = os.preadv

    def breaks_behind(descriptor: int, *arguments: Any) -> int:
        """Of the export's files only: the checkpoint is read by the same call."""
        if ".hf.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            breaks()
        return original(descriptor, *arguments)

    with monkeypatch.context() as patched:
        if breaking == "finish":
            patched.setattr(SafetensorsWriter, "finish", breaks)
        elif breaking == "fsync":
            patched.setattr(os, "fsync", breaks)
        else:
            patched.setattr(os, "preadv", breaks_behind)
        error = in_time(lambda: hf_export.export(request_))
    assert isinstance(error, OSError) and not request_.out.exists()
    hf_export.export(request_)


def test_verification_that_fails_last(
    run_directory: Path, request_: hf_export.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is written by then; none of it may be gone on with."""
    aside = request_.out.with_name(".hf.partial")

    def late(directory: Path, _: Any, names: list[str]) -> None:
        while not (aside / hf_export.CHECKSUMS).is_file():
            time.sleep(0.005)
        raise CheckpointError(f"{directory / names[0]}: SHA-256 differs")

    with monkeypatch.context() as patched:
        patched.setattr(hf_export, "verify_files", late)
        error = in_time(lambda: hf_export.export(request_))
    assert isinstance(error, CheckpointError) and "SHA-256 differs" in str(error)
    assert not list(request_.out.parent.iterdir())


def test_file_of_the_checkpoint_that_cannot_be_read(
    request_: hf_export.Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hf_export, "verify_files", broken)
    error = in_time(lambda: hf_export.export(request_))
    assert isinstance(error, CheckpointError)
    assert "cannot be read ([Errno 5] Input/output error)" in str(error)
    assert not list(request_.out.parent.iterdir())


def test_row_that_never_comes(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", [TensorSpec("a", (4, 2), torch.float32)])
    writer.write("a", torch.ones(2, 2), 2)
    errors: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: errors.append(in_time(writer.finish)))
    thread.start()
    writer.abandon()
    thread.join(LIMIT_S)
    assert isinstance(errors[0], Abandoned) and nothing_open(tmp_path)


def test_file_that_another_process_cuts(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", [TensorSpec("a", (4, 2), torch.float32)])
    writer.write("a", torch.ones(4, 2))
    os.truncate(tmp_path / "x", 20)
    error = in_time(writer.finish)
    assert isinstance(error, OSError) and "x was cut short while it was written" in str(error)


def test_rows_in_any_order_by_many(tmp_path: Path) -> None:
    """Twenty threads write rows of three tensors; the digest follows."""
    import hashlib

    specs = [
        TensorSpec("b", (40, 3), torch.float32),
        TensorSpec("a", (0, 7), torch.bfloat16),
        TensorSpec("c", (1,), torch.float32),
    ]
    writer = SafetensorsWriter(tmp_path / "model.safetensors", specs)
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    threads = [
        threading.Thread(target=writer.write, args=("b", rows[n : n + 2], n))
        for n in reversed(range(0, 40, 2))
    ]
    threads.append(threading.Thread(target=writer.write, args=("c", torch.tensor([3.0]))))
    for thread in threads:
        thread.start()
    digest = writer.finish()
    for thread in threads:
        thread.join()
    data = (tmp_path / "model.safetensors").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    found = read_weights(tmp_path)
    assert torch.equal(found["b"], rows) and found["c"].tolist() == [3.0]
    assert found["a"].shape == (0, 7)
