"""The whole folder through the real command: right pixels in the shards, or a reason."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards import build
from data_shards.chat import ChatTokenizer
from data_shards.manifest import read_manifest
from tests.data_shards.hostile import archives, chats
from tests.data_shards.hostile.pictures import LIMITS, all_cases

# The demo's names for what is hostile here.
PICTURES, CHATS, ARCHIVE = "captions", "vqa", "text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """All hostile files, built once by the command; the data sets are under `shards`."""
    folder = tmp_path_factory.mktemp("hostile")
    write_pictures(folder / "pictures")
    chats.lay_out(folder / "chats")
    lines = [line.data for line in chats.all_lines(folder / "chats")]
    (folder / "chats.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    archives.write(folder / "archive.tar")
    image_token_id = ChatTokenizer.from_directory(tokenizer_directory).image_token_id
    overrides = [
        "data=demo", "model=tiny", f"model.image_token_id={image_token_id}",
        f"data.root={folder}/shards", f"data.tokenizer={tokenizer_directory}",
        f"data.sources.{PICTURES}.input={folder}/pictures/rows.jsonl",
        f"data.sources.{CHATS}.input={folder}/chats.jsonl",
        f"data.sources.{CHATS}.image_root={folder}/chats",
        f"data.sources.{ARCHIVE}.input={folder}/archive.tar",
        f"data.sources.{ARCHIVE}.format=webdataset",
        *(f"data.sources.{name}.format=jsonl" for name in (PICTURES, CHATS)),
        f"data.images.max_pixels={LIMITS.max_pixels}",
        f"data.images.max_bytes={LIMITS.max_bytes}",
        "data.duplicates.exact=false",
        f"only=[{PICTURES},{CHATS},{ARCHIVE}]",
    ]  # fmt: skip
    assert build.main(overrides) == 0
    return folder


def write_pictures(folder: Path) -> None:
    """Every picture as a file, and a row that asks for it."""
    folder.mkdir()
    rows = []
    for number, case in enumerate(all_cases()):
        (folder / f"{number}.bin").write_bytes(case.data)
        turns = [
            {"role": "user", "content": f"<image>\nQue é {case.name}?"},
            {"role": "assistant", "content": "Uma imagem."},
        ]
        rows.append(json.dumps({"messages": turns, "images": [f"{number}.bin"]}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def reasons(folder: Path, name: str) -> dict[str, str]:
    """Key -> reason of every refused sample."""
    path = folder / "shards" / name / "quarantine" / "reasons.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {entry["key"]: entry["reason"] for entry in entries}


def members(folder: Path, name: str) -> dict[str, bytes]:
    """Members of all shards, as Python's tarfile reads them."""
    found = {}
    for path in sorted((folder / "shards" / name / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None and info.isreg() and "/" not in info.name
                found[info.name] = file.read()
    return found


def test_every_picture_ends_in_its_pixels_or_in_quarantine(folder: Path) -> None:
    refused, stored = reasons(folder, PICTURES), members(folder, PICTURES)
    for number, case in enumerate(all_cases()):
        key = f"{number:09d}"
        if case.shown is None:
            assert re.search(case.refused, refused.pop(key)), case.name
            assert f"{key}.json" not in stored
            continue
        (image,) = (data for name, data in stored.items() if name.startswith(f"{key}.0."))
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        assert np.array_equal(pixels, case.shown), case.name
    assert not refused


def test_every_chat_is_refused_for_its_reason_or_kept(folder: Path) -> None:
    refused, stored = reasons(folder, CHATS), members(folder, CHATS)
    for number, line in enumerate(chats.all_lines(folder / "chats")):
        key = f"{number:09d}"
        if line.refused is None:
            assert f"{key}.json" in stored, (line.name, refused.get(key))
        else:
            assert re.search(line.refused, refused.pop(key, "kept")), line.name
            assert len(line.data) < 2000 or len(reasons(folder, CHATS)[key]) < 1000
    assert not refused
    secret = (folder / "secret.png").read_bytes()
    assert all(data != secret and b"root:" not in data for data in stored.values())


def test_nothing_of_an_archive_is_followed(folder: Path) -> None:
    stored = members(folder, ARCHIVE)
    kept = [json.loads(data) for name, data in sorted(stored.items()) if name.endswith(".json")]
    assert [record["origin"] for record in kept] == [f"archive.tar:{key}" for key in archives.GOOD]
    path = folder / "shards" / ARCHIVE / "quarantine" / "reasons.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for entry, (key, why) in zip(found, archives.refused(), strict=True):
        assert entry["origin"] == f"archive.tar:{key}"
        assert re.search(why, entry["reason"]), entry


def test_the_manifests_are_whole(folder: Path) -> None:
    for name in (PICTURES, CHATS, ARCHIVE):
        manifest = read_manifest(folder / "shards" / name / "manifest.parquet")
        manifest.check_shards()
        assert manifest.info.quarantined == len(reasons(folder, name))
