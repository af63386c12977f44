"""Images that rows name: bytes, data URLs, and paths, which may not lead anywhere else."""

import base64
import os
from pathlib import Path

import pytest

from data_shards.sample import SampleError
from data_shards.sources import rows
from data_shards.sources.rows import read_image, read_inside


def test_the_forms_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(b"file")
    url = "data:image/png;base64," + base64.b64encode(b"inline").decode()
    forms = {
        b"raw": b"raw",
        "sub/a.png": b"file",
        url: b"inline",
    }
    for form, data in forms.items():
        assert read_image(form, tmp_path, "image 0") == data
        assert read_image({"bytes": None, "path": form}, tmp_path, "image 0") == data
    assert read_image({"bytes": b"in", "path": "x.png"}, tmp_path, "image 0") == b"in"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, r"neither bytes nor a path \(int\)"),
        (b"", "neither bytes nor a path"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (["a.png"], r"neither bytes nor a path \(list\)"),
        ("data:image/png;base64,a$", "does not decode"),
        ("https://example.com/a.png", "download the images first"),
        ("file:///etc/passwd", "download the images first"),
        ("s3://bucket/a.png", "download the images first"),
        ("\ud800.png", "cannot be read"),
    ],
)
def test_what_is_no_image(tmp_path: Path, value: object, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read_image(value, tmp_path, "image 0")


def test_paths_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "dir").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    for name in ("../secret", "x/../../secret", "link", "dir/secret", str(tmp_path / "secret")):
        with pytest.raises(SampleError, match="image folder"):
            read_inside(folder, name)
    for name in ("missing", ".", "loop", "a\0b", "pipe", "n" * 5000):
        with pytest.raises(SampleError):
            read_inside(folder, name)


def test_files_too_large_to_be_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    monkeypatch.setattr(rows, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(SampleError, match="has over 4 bytes"):
        read_inside(tmp_path, "a.png")
